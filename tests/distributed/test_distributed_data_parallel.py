"""P9: data parallelism in buckets of any size is plain AdamW on one process; nothing hangs, nothing is lost.

Faults to catch: a bucket that is not sent; a bucket that is sent twice; a bucket that is sent before its last gradient;
gradients added in bf16; hooks left behind; buckets sent in the order in which they fill; moments shared between
buckets; weight decay on biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from declared_net import ADAMW, Net, adamw, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stretto.deferred import Deferred
from stretto.distributed import AdamW, DataParallel
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.params import Init, ParamSpec, declare
from stretto.testing import Pool
from stretto.world import World

pytestmark = pytest.mark.gloo

STEPS, MICROBATCHES = 4, 2


def plain(steps: int = STEPS) -> dict[str, Tensor]:
    """One process, torch alone."""
    net = Net()
    adam = adamw(net)
    for step in range(steps):
        adam.zero_grad()
        net(rows(step)).backward()
        adam.step()
    return {name: p.detach() for name, p in net.named_parameters()}


@settings(max_examples=settings.default.max_examples // 5)
@given(sizes=st.lists(st.one_of(st.floats(1e-9, 1e-3), st.floats(1e-3, 100.0)), min_size=1, max_size=4))
@pytest.mark.parametrize("dp", [2, 3, 5])
def test_any_bucket_size_equals_one_process(pool: Pool, dp: int, sizes: list[float]) -> None:
    want = plain()
    for found in (each for rank in pool.run(dp, _train, sizes) for each in rank):
        for name, tensor in want.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-12, msg=f"{name}: {found[name] - tensor}")


def test_one_rank_is_one_process() -> None:
    (found,) = _train(World.single(), [1e-6])
    for name, tensor in plain().items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dp", [1, 2])
def test_gradients_add_up_in_fp32(pool: Pool, dp: int) -> None:
    """256 + 1 in bf16 is 256: neither microbatches nor ranks may be added in it."""
    assert pool.run(dp, _two_hundred_and_fifty_seven) == [(torch.float32, 257.0 * dp)] * dp


def test_masters_keep_what_bf16_would_lose(pool: Pool) -> None:
    """A thousand updates of 2e-4 move 1 to 0.8; in bf16, where 1 - 2e-4 is 1, they would not move it."""
    (parameter, master) = _many_small_updates(World.single())
    assert master == pytest.approx(0.8, abs=1e-4)
    assert parameter == torch.tensor(master).bfloat16().item()


def test_a_bucket_leaves_in_the_middle_of_the_last_backward(pool: Pool) -> None:
    """Observed in each backward: which buckets were sent by the time the gradient reaches the first layer."""
    for add_in_forward, last, end in pool.run(2, _watch_the_sending):
        assert add_in_forward == []
        assert last == ["2.bias", "2.weight", "1.bias", "1.weight"]
        assert end == ["2.bias", "2.weight", "1.bias", "1.weight", "0.bias", "0.weight", "scale"]


def test_buckets_are_in_the_order_in_which_a_backward_fills_them() -> None:
    """One bucket for what does not decay reaches down to the first parameter: it must not hold up the others."""
    with (
        ParallelState.build(Layout.of(), World.single()) as state,
        DataParallel({0: Net()}, state, bucket_mb=210 / 2**20) as weights,
    ):
        names = [[item.name.removeprefix("layers.") for item in bucket.items] for bucket in weights.all_buckets]
        assert names == [["2.weight"], ["1.weight"], ["0.weight"], ["2.bias", "1.bias", "0.bias", "scale"]]


def test_ranks_whose_graphs_differ_add_the_same_things_up(pool: Pool) -> None:
    """Rank 1 uses the parameters the other way round, so autograd finishes their gradients in another order."""
    for rank in pool.run(2, _different_graphs, timeout=30.0):
        assert rank == {"a": 3.0, "b": 30.0}


def test_a_bucket_waits_for_a_gradient_of_an_earlier_microbatch(pool: Pool) -> None:
    """A parameter that only the first microbatch used is not missing, and is sent with what it got."""
    assert pool.run(2, _used_in_the_first_only, timeout=30.0) == [{"a": 4.0, "b": 2.0}] * 2


@pytest.mark.parametrize("where", [(0, 1), (1,)])
def test_a_parameter_without_a_gradient_is_named(pool: Pool, where: tuple[int, ...]) -> None:
    """On all ranks, or on one that then ends: with its name, within seconds and not by a time-out."""
    with pytest.raises(RuntimeError, match=r"no gradient reached unused\.weight: .*use them in its forward"):
        pool.run(2, _without_a_gradient, where, timeout=30.0)


def test_without_reduce_gradients_are_summed_all_the_same(pool: Pool) -> None:
    """`reduce` makes overlap, not correctness."""
    assert pool.run(2, _used_in_the_first_only, False, timeout=30.0) == [{"a": 4.0, "b": 2.0}] * 2


def test_a_gradient_that_comes_too_late_is_an_error() -> None:
    """It would be lost to the other ranks, or land in the middle of a sum."""
    with ParallelState.build(Layout.of(), World.single()) as state, DataParallel({0: (net := Net())}, state) as weights:
        weights.reduce(0)
        net(rows(0)).backward()
        with pytest.raises(RuntimeError, match=r"gradient of .* came after its bucket was sent: reduce\(stage\) must"):
            net(rows(1)).backward()
        weights.zero()
        weights.reduce(0)
        with pytest.raises(RuntimeError, match="twice in one step"):
            weights.reduce(0)


def test_weight_gradients_that_are_put_off() -> None:
    """Autograd runs a parameter's hooks in the I already, with nothing there; the bucket waits for the W."""
    with ParallelState.build(Layout.of(), World.single()) as state:
        net, deferred = nn.Module(), Deferred()
        weight = declare(net, "weight", ParamSpec((3, 2), Init()), dtype=torch.float64)
        weight.data.copy_(torch.arange(6).view(3, 2))
        with DataParallel({0: net}, state) as weights:
            x = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
            y = _PutOff.apply(x, weight, deferred).sum()
            weights.reduce(0)
            with deferred.collect(0, 0):
                y.backward()
            assert not weights.buckets[0][0].sent
            deferred.run(0, 0)
            assert weights.buckets[0][0].sent
            weights.finish()
            assert torch.equal(weights.grad(weight), torch.tensor([[1.0, 2.0]] * 3, dtype=torch.float64))


def test_close_takes_the_hooks_off() -> None:
    net = Net()
    with ParallelState.build(Layout.of(), World.single()) as state:
        with DataParallel({0: net}, state):
            net(rows(0)).backward()
            assert all(p.grad is None for p in net.parameters())
        net(rows(0)).backward()
        assert all(p.grad is not None for p in net.parameters())


def _train(world: World, sizes: Sequence[float]) -> list[dict[str, Tensor]]:
    found = []
    with ParallelState.build(Layout.of(dp=world.size), world) as state:
        for bucket_mb in sizes:
            net = Net()
            with DataParallel({0: net}, state, bucket_mb=bucket_mb) as weights:
                adam = AdamW(weights, **ADAMW)
                for step in range(STEPS):
                    weights.zero()
                    mine = rows(step).chunk(world.size)[world.rank].chunk(MICROBATCHES)
                    for microbatch in mine[:-1]:
                        net(microbatch).backward()
                    weights.reduce(0)
                    net(mine[-1]).backward()
                    weights.finish()
                    adam.step(1e-2)
                found.append({name: p.detach().clone() for name, p in net.named_parameters()})
    return found


def _two_hundred_and_fifty_seven(world: World) -> tuple[torch.dtype, float]:
    net = _scalars("a", dtype=torch.bfloat16)
    with (
        ParallelState.build(Layout.of(dp=world.size), world) as state,
        DataParallel({0: net}, state) as weights,
    ):
        (net.a * 256).backward()
        weights.reduce(0)
        (net.a * 1).backward()
        weights.finish()
        return weights.grad(net.a).dtype, weights.grad(net.a).item()


def _many_small_updates(world: World) -> tuple[float, float]:
    net = _scalars("a", dtype=torch.bfloat16)
    with ParallelState.build(Layout.of(), world) as state, DataParallel({0: net}, state) as weights:
        adam = AdamW(weights, betas=(0.0, 0.0), eps=1e-12, weight_decay=0.0)
        for _ in range(1000):
            weights.zero()
            net.a.backward()
            weights.finish()
            adam.step(2e-4)
        return net.a.item(), adam.masters[0][0].item()


def _watch_the_sending(world: World) -> tuple[list[str], list[str], list[str]]:
    sent: list[str] = []
    with ParallelState.build(Layout.of(dp=world.size), world) as state:
        net = Net()
        with DataParallel({0: net}, state, bucket_mb=1e-9) as weights:
            for bucket in weights.all_buckets:
                bucket.send = partial(_record, bucket.send, sent, bucket.items[0].name)  # type: ignore[method-assign]
            seen: list[list[str]] = []

            def watch(_module: nn.Module, _x: object, y: Tensor) -> None:
                y.register_hook(lambda _dy: seen.append(list(sent)))

            net.layers[0].register_forward_hook(watch)
            net(rows(0)).backward()
            weights.reduce(0)
            net(rows(1)).backward()
            weights.finish()
    return seen[0], [n.removeprefix("layers.") for n in seen[1]], [n.removeprefix("layers.") for n in sent]


def _record(send: Any, sent: list[str], name: str) -> None:
    sent.append(name)
    send()


def _different_graphs(world: World) -> dict[str, float]:
    net = _scalars("a", "b")
    with (
        ParallelState.build(Layout.of(dp=world.size), world) as state,
        DataParallel({0: net}, state, bucket_mb=1e-9) as weights,
    ):
        weights.reduce(0)
        factor = world.rank + 1.0
        # Autograd goes back from what was computed last: rank 0 finishes b first, rank 1 a.
        if world.rank == 0:
            a, b = net.a * 1, net.b * 10
        else:
            b, a = net.b * 10, net.a * 1
        loss = factor * (a + b)
        loss.backward()
        weights.finish()
        return {name: weights.grad(p).item() for name, p in net.named_parameters()}


def _used_in_the_first_only(world: World, armed: bool = True) -> dict[str, float]:
    net = _scalars("a", "b")
    with (
        ParallelState.build(Layout.of(dp=world.size), world) as state,
        DataParallel({0: net}, state, bucket_mb=1e-9) as weights,
    ):
        (net.a + net.b).backward()
        if armed:
            weights.reduce(0)
        net.a.backward()
        weights.finish()
        return {name: weights.grad(p).item() for name, p in net.named_parameters()}


def _without_a_gradient(world: World, where: tuple[int, ...]) -> None:
    net = Net()
    net.unused = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    declare(net.unused, "weight", ParamSpec((2, 2), Init()))
    with (
        ParallelState.build(Layout.of(dp=world.size), world) as state,
        DataParallel({0: net}, state, bucket_mb=1e-9) as weights,
    ):
        weights.reduce(0)
        loss = net(rows(0))
        (loss if world.rank in where else loss + net.unused.weight.sum()).backward()
        weights.finish()


def _scalars(*names: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A module of scalar parameters, all 1."""
    net = nn.Module()
    for name in names:
        declare(net, name, ParamSpec((), Init()), dtype=dtype).data.fill_(1.0)
    return net


class _PutOff(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, deferred: Deferred) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.deferred = deferred
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        return dy @ weight, ctx.deferred.gradient(weight, lambda: dy.t() @ x), None
