"""The queue of deferred weight gradients: what waits for a W, what for a collective, and what is forgotten."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stretto.deferred import Deferred

pytestmark = pytest.mark.gloo

WEIGHT = nn.Parameter(torch.ones(1))


def test_what_an_i_defers_runs_with_its_w_in_order() -> None:
    """Catches jobs of another microbatch or stage, and another order: sums would round otherwise."""
    queue, done = Deferred(), list[str]()
    assert not queue.defer(WEIGHT, lambda: done.append("outside"))
    for stage, mb in ((0, 0), (1, 0), (0, 1)):
        with queue.collect(stage, mb):
            for n in range(2):
                assert queue.defer(WEIGHT, lambda s=stage, m=mb, n=n: done.append(f"{s}.{m}.{n}"))  # type: ignore[misc]
    assert (done, queue.waiting(0), queue.waiting(1)) == ([], (0, 1), (0,))
    queue.run(0, 1)
    queue.run(1, 0)
    assert done == ["0.1.0", "0.1.1", "1.0.0", "1.0.1"]
    assert (queue.waiting(0), queue.waiting(1)) == ((0,), ())
    assert queue.weights() == {WEIGHT}


def test_only_one_waits_for_a_collective_and_none_of_an_i() -> None:
    """Catches a job that is lost to the next, and one of a whole backward counted among those of an I."""
    queue, done = Deferred(), list[int]()
    queue.behind(lambda: done.append(1))
    queue.behind(lambda: done.append(2))
    assert done == [1]
    with queue.collect(0, 0):
        assert done == [1, 2]
        queue.defer(WEIGHT, lambda: done.append(3))
        queue.flush()  # a collective of the I
    assert done == [1, 2]
    queue.run(0, 0)
    assert done == [1, 2, 3]


def test_a_failed_step_leaves_nothing_to_the_next() -> None:
    queue, done = Deferred(), list[int]()
    with queue.collect(0, 0):
        queue.defer(WEIGHT, lambda: done.append(1))
    queue.behind(lambda: done.append(2))
    queue.clear()
    queue.flush()
    assert (done, queue.waiting(0), queue.weights()) == ([], (), set())
