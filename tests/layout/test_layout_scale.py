"""A million ranks cost what eight do: nothing enumerates the world."""

from __future__ import annotations

import time

import pytest

from stretto.layout import Layout

pytestmark = pytest.mark.pure

MILLION = Layout.of(tp=8, cp=4, dp=(64, 32), pp=16, ep=64)


def test_a_million_ranks_in_closed_form() -> None:
    assert MILLION.world == 1_048_576
    start = time.thread_time()
    for rank in (0, 1, 123_456, 777_777, 1_048_575):
        coords = MILLION.coords(rank)
        assert MILLION.rank(**coords) == rank
        for axis in MILLION.axes:
            group = MILLION.group(rank, axis)
            assert rank in group
            if axis != "embed":
                assert len(group) == MILLION.size(axis)
    elapsed = time.thread_time() - start
    # About 5 ms of this thread; one pass over a million ranks would take a second for each question.
    assert elapsed < 0.5, f"{elapsed:.3f} s"


def test_known_places_among_a_million() -> None:
    assert MILLION.coords(1_048_575)["pp"] == 15
    assert MILLION.group(0, "tp") == tuple(range(8))
    assert MILLION.group(70_000, "pp")[:2] == (4464, 70_000)
