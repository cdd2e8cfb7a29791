"""Requests that end in time, and reductions over the store in which nobody waits.

Faults to catch: a request without a deadline; a rank left out of a merge or counted twice; an absent rank whose whole
block is named, or that is not named when it is the only one of its block; a value of a stranger that is parsed.
"""

from __future__ import annotations

import json
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore

from stretto.store import FAN, StoreLostError, TimedStore, absent, combine, in_time, read_json

pytestmark = pytest.mark.gloo  # no processes, but the store is torch's

SIZES = st.one_of(st.integers(1, 40), st.integers(FAN**2 - 2, FAN**2 + 2))


def merged(values: list[bytes]) -> str:
    return json.dumps(sorted(rank for value in values for rank in json.loads(value)))


@given(SIZES, st.integers(0, 2**32))
def test_the_last_to_come_and_no_other_has_all_values(size: int, seed: int) -> None:
    order = list(range(size))
    random.Random(seed).shuffle(order)
    store = TimedStore(HashStore())
    got = [combine(store, rank, size, json.dumps([rank]), merged) for rank in order]
    assert got[:-1] == [None] * (size - 1)
    assert json.loads(got[-1] or "") == list(range(size))


@given(SIZES, st.data())
def test_the_absent_are_named_and_nobody_else(size: int, data: st.DataObject) -> None:
    missing = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=5))
    store = TimedStore(HashStore())
    for rank in set(range(size)) - missing:
        assert combine(store, rank, size, "") is None
    assert absent(store, size) == sorted(missing)


class Deaf:
    """A store behind a link that is cut."""

    def get(self, *_: object) -> bytes:
        time.sleep(5)
        return b""

    check = add = wait = get


def test_a_store_that_does_not_answer_is_lost_in_time_and_stays_so() -> None:
    store = TimedStore(Deaf(), seconds=0.2)  # type: ignore[arg-type]
    began = time.monotonic()
    with pytest.raises(StoreLostError, match=r"did not answer within 0\.2 s"):
        store.get("key")
    with pytest.raises(StoreLostError, match="any more"):
        store.check(["key"])
    assert time.monotonic() - began < 2


def test_a_wait_for_nothing_ends_in_time_and_what_a_store_raises_comes_through() -> None:
    store = TimedStore(HashStore())
    assert not store.wait("nobody sets it", 0.05)
    store.set("there", "x")
    assert store.wait("there", 0.05)
    assert store.poll("there", 0.05)
    with pytest.raises(TypeError):
        store.add("there", "no number")  # type: ignore[arg-type]
    assert store.get("there") == b"x"


def test_a_call_that_takes_too_long_is_left_behind() -> None:
    assert in_time(lambda: 7, 1.0) == 7
    with pytest.raises(TimeoutError):
        in_time(lambda: time.sleep(5), 0.1)
    with pytest.raises(ZeroDivisionError):
        in_time(lambda: 1 // 0, 1.0)


@pytest.mark.parametrize("value", [b"", b"\xff", b"{", b"[" * 100_000, b'"' + b"x" * 2**20 + b'"'])
def test_what_is_no_json_of_a_rank_is_an_error(value: bytes) -> None:
    with pytest.raises(ValueError, match=r"no JSON|more than any rank writes"):
        read_json(value)
