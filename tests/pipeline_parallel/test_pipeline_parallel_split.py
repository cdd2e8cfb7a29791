"""Backwards split into I and W: the same gradients, the input's first, and less memory in between."""

from __future__ import annotations

import time
import weakref
from functools import partial
from random import Random
from typing import Any

import pipeline_reference as pt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipeline_reference import Model
from torch import Tensor, nn

from stretto.deferred import Deferred
from stretto.pipeline_parallel import Executor, LeftoverError, Link, OwnWeights, Stage, TensorMeta
from stretto.schedule import Action, Op, Schedule, check, lower, requires
from stretto.testing import Pool
from stretto.world import Axis, World

pytestmark = pytest.mark.gloo


class PutOff(torch.autograd.Function):
    """y = x w^T, as a layer would write it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, deferred: Deferred) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.deferred = deferred
        return x @ w.mT

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, w = ctx.saved_tensors
        return dy @ w, ctx.deferred.gradient(w, partial(outer, dy, x)), None


def outer(dy: Tensor, x: Tensor) -> Tensor:
    return dy.mT @ x


class Linear(nn.Module):
    def __init__(self, inner: nn.Linear, deferred: Deferred) -> None:
        super().__init__()
        self.weight, self.bias, self.deferred = inner.weight, inner.bias, deferred

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = PutOff.apply(x, self.weight, self.deferred) + self.bias
        return y


def split_stage(model: Model, stage: int, aware: bool) -> Stage:
    """A stage of the model; if `aware`, its linears leave their weight gradients with a queue."""
    whole, deferred = model.stage(stage), Deferred()
    if aware:
        layers = whole.module.layers
        for n, layer in enumerate(layers):
            if isinstance(layer, nn.Linear):
                layers[n] = Linear(layer, deferred)
    return Stage(stage, whole.module, whole.boundary, deferred)


def zb_h1(p: int, m: int) -> Schedule:
    """The first of the zero-bubble schedules (Qi et al. 2023): W fills what 1F1B leaves idle."""

    def rank(r: int) -> tuple[Action, ...]:
        warmup, out, w = min(p - r - 1, m), [], 0
        out += [Action(r, Op.F, i) for i in range(warmup)]
        for i in range(m):
            if warmup + i < m:
                out.append(Action(r, Op.F, warmup + i))
            out.append(Action(r, Op.I, i))
            if i >= r:
                out.append(Action(r, Op.W, w))
                w += 1
        return (*out, *(Action(r, Op.W, j) for j in range(w, m)))

    s = Schedule(tuple(range(p)), m, tuple(map(rank, range(p))))
    check(s)
    return s


def _split_step(world: World, model: Model, m: int, aware: bool) -> pt.Outcome:
    link = Link(pt.pp_axis(world), world.device)
    stage = split_stage(model, world.rank, aware)
    program = lower(zb_h1(world.size, m))
    loss = Executor(program, world.rank, {world.rank: stage}, link, OwnWeights()).step(model.microbatches(m))
    return pt.Outcome(loss, pt.gradients({world.rank: stage.module}))


@pytest.mark.parametrize("aware", [True, False])
@pytest.mark.parametrize(("p", "m"), [(1, 1), (2, 1), (2, 5), (4, 3), (4, 6)])
def test_zero_bubble_equals_one_process(pool: Pool, p: int, m: int, aware: bool) -> None:
    model = Model(tuple((3 + s % 3, 2, 3 + (s + 1) % 3) for s in range(p)))
    outcomes = pool.run(p, _split_step, model, m, aware)
    pt.assert_equal_to_reference(outcomes, pt.reference(model, m), last_rank=p - 1)


def prepared(dtype: torch.dtype = torch.float64) -> tuple[Stage, Linear, Tensor, Tensor]:
    deferred = Deferred()
    layer = Linear(nn.Linear(4, 4, dtype=dtype), deferred)
    stage = Stage(1, lambda_module(lambda x, _: torch.tanh(layer(x))), TensorMeta((2, 4), dtype), deferred)
    return stage, layer, torch.randn(2, 4, dtype=dtype), torch.randn(2, 4, dtype=dtype)


def lambda_module(forward: Any) -> nn.Module:
    module = nn.Module()
    module.forward = forward
    return module


def test_the_input_gradient_comes_before_the_weight_gradient() -> None:
    stage, layer, x, dy = prepared()
    stage.forward(0, x, None)
    dx = stage.backward_input(0, dy)
    assert dx is not None
    assert layer.weight.grad is None
    assert layer.bias.grad is not None, "it was not deferred"
    assert stage.kept == (0,)
    stage.backward_weight(0)
    assert stage.kept == ()
    split = [layer.weight.grad, layer.bias.grad]
    layer.zero_grad()
    stage.forward(1, x, None)
    assert torch.equal(dx, stage.backward(1, dy))  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(split, [layer.weight.grad, layer.bias.grad], strict=True))


def test_hooks_of_the_weight_run_with_the_weight_gradient() -> None:
    stage, layer, x, dy = prepared()
    log: list[str] = []

    def take(p: nn.Parameter) -> None:
        """Like the hook of a bucket: takes the gradient away; nothing to take during an I that put it off."""
        if p.grad is not None:
            log.append("weight" if p is layer.weight else "bias")
            p.grad = None

    layer.weight.register_post_accumulate_grad_hook(take)
    layer.bias.register_post_accumulate_grad_hook(take)
    for mb in (0, 1):
        stage.forward(mb, x, None)
    stage.backward_input(0, dy)
    stage.backward_input(1, dy)
    assert log == ["bias", "bias"]
    stage.backward_weight(1)
    stage.backward_weight(0)
    assert log == ["bias", "bias", "weight", "weight"]


def test_the_graph_is_gone_after_the_input_gradient() -> None:
    deferred = Deferred()
    layer = Linear(nn.Linear(4, 4), deferred)
    seen: list[weakref.ref[Any]] = []

    def forward(x: Tensor, _: object) -> Tensor:
        y = torch.tanh(layer(x))  # tanh keeps its output, which nothing needs for the weight gradient
        seen.append(weakref.ref(y.untyped_storage()))
        return y * 2

    stage = Stage(1, lambda_module(forward), TensorMeta((2, 4), torch.float32), deferred)
    stage.forward(0, torch.randn(2, 4), None)
    assert seen[0]() is not None
    stage.backward_input(0, torch.randn(2, 4))
    assert seen[0]() is None


def test_a_weight_that_is_a_view() -> None:
    deferred = Deferred()
    whole = nn.Parameter(torch.randn(8, 4, dtype=torch.float64))
    module = lambda_module(lambda x, _: PutOff.apply(x, whole[2:6], deferred))
    stage = Stage(1, module, TensorMeta((2, 4), torch.float64), deferred)
    x, dy = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    stage.forward(0, x, None)
    stage.backward_input(0, dy)
    stage.backward_weight(0)
    expected = torch.zeros(8, 4, dtype=torch.float64)
    expected[2:6] = dy.mT @ x
    assert whole.grad is not None
    assert torch.equal(whole.grad, expected)


def test_a_weight_gradient_that_never_came_is_named() -> None:
    model = Model(((3, 2),))
    schedule = Schedule((0,), 1, ((Action(0, Op.F, 0), Action(0, Op.I, 0)),))
    link = Link(Axis.single("pp"), torch.device("cpu"))
    executor = Executor(schedule, 0, {0: split_stage(model, 0, aware=True)}, link, OwnWeights())
    with pytest.raises(LeftoverError, match="what stage 0 keeps of microbatch 0"):
        executor.step(model.microbatches(1))


def any_schedule(random: Random, placement: tuple[int, ...], ranks: int, m: int) -> Schedule:
    """Stages anywhere, each backward whole or split, and on every rank any order that respects `requires`."""
    todo: list[list[Action]] = [[] for _ in range(ranks)]
    for stage, rank in enumerate(placement):
        for mb in range(m):
            ops = random.choice([(Op.F, Op.B), (Op.F, Op.I, Op.W)])
            todo[rank] += [Action(stage, op, mb) for op in ops]
    everything = Schedule(placement, m, tuple(map(tuple, todo)))
    out: list[list[Action]] = [[] for _ in range(ranks)]
    done: set[Action] = set()
    while any(todo):
        ready = [(r, a) for r, left in enumerate(todo) for a in left if all(n in done for n in requires(a, everything))]
        rank, a = random.choice(ready)
        todo[rank].remove(a)
        out[rank].append(a)
        done.add(a)
    return Schedule(placement, m, tuple(map(tuple, out)))


class Dawdles(nn.Module):
    """Takes its time, now and then, so that ranks drift apart."""

    def __init__(self, inner: nn.Module, seed: int) -> None:
        super().__init__()
        self.inner, self.random = inner, Random(seed)

    def forward(self, x: Tensor | None, microbatch: object) -> Tensor:
        time.sleep(self.random.choice([0.0, 0.0, 0.003]))
        y: Tensor = self.inner(x, microbatch)
        return y


def _any_step(world: World, model: Model, schedule: Schedule, two_ways: bool) -> pt.Outcome:
    link = Link(pt.pp_axis(world), world.device, pt.pairs(world) if two_ways else {})
    here = [s for s, rank in enumerate(schedule.placement) if rank == world.rank]
    stages = {s: split_stage(model, s, aware=s % 2 == 0) for s in here}
    parts = {s: stage.module for s, stage in stages.items()}
    for s, stage in stages.items():
        stage.module = Dawdles(stage.module, s)
    program = lower(schedule)
    executor = Executor(program, world.rank, stages, link, OwnWeights())
    for _ in range(2):  # the first with announcements, the second without
        for part in parts.values():
            part.zero_grad()
        loss = executor.step(model.microbatches(schedule.num_microbatches))
    return pt.Outcome(loss, pt.gradients(parts))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    random=st.randoms(use_true_random=False),
    ranks=st.integers(1, 4),
    stages=st.integers(1, 5),
    m=st.integers(1, 4),
    two_ways=st.booleans(),
)
def test_any_order_that_can_be_run_is_right(
    pool: Pool, random: Random, ranks: int, stages: int, m: int, two_ways: bool
) -> None:
    placement = tuple(random.randrange(ranks) for _ in range(stages))
    schedule = any_schedule(random, placement, ranks, m)
    model = Model(tuple((3 + s % 2, 2, 3 + (s + 1) % 2) for s in range(stages)))
    outcomes = pool.run(ranks, _any_step, model, schedule, two_ways)
    pt.assert_equal_to_reference(outcomes, pt.reference(model, m), last_rank=placement[-1])
