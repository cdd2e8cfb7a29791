"""Activations that a rank really holds, beside what the order says, for every schedule."""

from __future__ import annotations

import pytest

from benchmarks.schedule_memory import Row, peaks
from stretto.schedule import GENERATORS
from stretto.testing import Pool
from stretto.world import World

pytestmark = [pytest.mark.gloo, pytest.mark.nightly]


def every(world: World) -> list[Row]:
    return [peaks(world, name, 2, 5, 4) for name in sorted(GENERATORS)]


def test_a_rank_holds_what_its_order_says(pool: Pool) -> None:
    """In storages that live after each computation, as microbatches of all layers of the rank. Catches a
    graph that outlives its backward, a W that does not let go of what it used (one more each), and an estimate of what
    a forward keeps that is off by more than a tenth."""
    for row in pool.run(2, every)[0]:
        for predicted, measured in zip(row.predicted, row.measured, strict=True):
            assert 0.9 * predicted < measured < predicted + 0.5, row
