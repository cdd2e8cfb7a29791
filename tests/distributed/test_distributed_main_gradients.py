"""Weight gradients that layers add up themselves, some of them deferred until a message is under way.

Faults to catch: what is deferred forgotten at the end of a step; what an earlier backward deferred counted among the
last gradients; what a failed step deferred added in the next; what is deferred lost to the next; a gradient recorded by
autograd.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stretto.distributed import DataParallel, MainGradients
from stretto.distributed.watch import GradientWatch, first_microbatch
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.params import Init, ParamSpec, declare
from stretto.testing import Pool
from stretto.world import World

pytestmark = pytest.mark.gloo


class Two(nn.Module):
    """Two weights whose gradients somebody adds up directly."""

    def __init__(self, direct: MainGradients) -> None:
        super().__init__()
        for name in ("a", "b"):
            direct.expect(declare(self, name, ParamSpec((3,), Init()), dtype=torch.float32))


def times(factor: float) -> Callable[[Tensor, bool], object]:
    """A gradient of `factor` for each element."""
    return lambda total, first_microbatch: total.fill_(factor) if first_microbatch else total.add_(factor)


def single() -> tuple[MainGradients, Two, DataParallel]:
    direct = MainGradients()
    net = Two(direct)
    return direct, net, DataParallel({0: net}, ParallelState.build(Layout.of(), World.single()), direct=direct)


def test_what_is_put_off_is_there_when_the_step_ends() -> None:
    direct, net, weights = single()
    for put in (direct.defer, direct.add):
        put(net.a, times(2))
        put(net.b, times(3))
    weights.finish()
    assert weights.grad(net.a).tolist() == [4.0] * 3
    assert weights.grad(net.b).tolist() == [6.0] * 3


def test_no_more_than_one_waits_and_a_message_ends_that() -> None:
    direct, net, _ = single()
    done: list[str] = []
    direct.defer(net.a, lambda *_: done.append("a"))
    assert done == []
    direct.defer(net.b, lambda *_: done.append("b"))
    assert done == ["a"]
    direct.flush()
    assert done == ["a", "b"]
    direct.flush()
    assert done == ["a", "b"]


def test_a_step_does_not_inherit_what_a_failed_one_left() -> None:
    direct, net, weights = single()
    direct.defer(net.a, times(100))
    weights.zero()
    for weight in (net.a, net.b):
        direct.add(weight, times(1))
    weights.finish()
    assert weights.grad(net.a).tolist() == [1.0] * 3


def test_what_is_put_off_is_no_part_of_a_forward_that_happens_to_run() -> None:
    """In a recomputation gradients are recorded, and x may be a leaf that wants one."""
    direct, net, weights = single()
    x = torch.ones(3, requires_grad=True)
    direct.defer(net.a, lambda total, _: total.add_(x))
    with torch.enable_grad():
        direct.flush()
    assert not weights.grad(net.a).requires_grad


def test_buckets_leave_with_their_last_gradient_and_not_with_one_put_off_before(pool: Pool) -> None:
    assert pool.run(2, _last_gradients) == [[2.0 * (1 + 10)] * 3] * 2


def _last_gradients(world: World) -> list[float]:
    direct = MainGradients()
    net = Two(direct)
    with (
        ParallelState.build(Layout.of(dp=world.size), world) as state,
        DataParallel({0: net}, state, bucket_mb=1e-9, direct=direct) as weights,
    ):
        direct.add(net.b, times(1))
        direct.defer(net.a, times(1))
        weights.reduce(0)
        direct.defer(net.b, times(10))
        direct.defer(net.a, times(10))
        weights.finish()
        assert torch.equal(weights.grad(net.a), weights.grad(net.b))
        return [float(g) for g in weights.grad(net.a)]


def test_a_gradient_of_the_forward_is_looked_at_there() -> None:
    """All forwards of a step may come before its backwards: by then nobody knows whose part is no number, and where
    gradients are sharded they may have left."""
    (direct, net, weights), watch = single(), GradientWatch()
    for bucket in weights.all_buckets:
        bucket.watch = watch
    weights.zero()
    for value in (1.0, float("nan"), 2.0):
        direct.add_in_forward(net.a, times(value))
    for _ in range(3):
        direct.complete(net.a)
    assert first_microbatch(watch.take()) == (1, ["a"])
