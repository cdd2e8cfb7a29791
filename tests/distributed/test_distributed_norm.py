"""P5: the norm counts every logical element once, in any layout, to the same bits on every rank.

Gradients are written where the declarations say, from one logical gradient, and padding is filled with rubbish.
Faults to catch: padding counted; a copy of a key/value head counted twice; a copy of a tied embedding counted twice; a
replicated norm counted once per rank; squares not summed over the pipeline; partial sums left out; a short gradient
that is lengthened; no limit that stops all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from stretto.arguments.schema import ModelConfig
from stretto.distributed import DataParallel, clip_factor, grad_norm
from stretto.distributed.partial import sum_partial_gradients
from stretto.layout import Layout
from stretto.models import StageSpec, Transformer
from stretto.parallel_state import ParallelState
from stretto.params import Init, Logical, ParamSpec, collect, declare
from stretto.random import normal_
from stretto.tensor_parallel import Build
from stretto.testing import Pool
from stretto.world import World

pytestmark = pytest.mark.gloo

MODEL = ModelConfig(
    layers=3,
    hidden=12,
    heads=4,
    kv_heads=2,
    head_dim=4,
    ffn=20,
    vocab=19,
    norm="layer",
    position="learned",
    bias=True,
    qk_norm=True,
)
SIZES = [(1, 1, 2), (2, 1, 1), (4, 1, 2), (1, 2, 2), (1, 3, 1), (2, 2, 2), (4, 2, 1)]


@dataclass(frozen=True)
class Found:
    norm: Tensor
    clipped: Tensor
    gradient: list[tuple[str, tuple[int, ...], Tensor]]


@pytest.mark.parametrize(("tp", "pp", "dp"), SIZES)
def test_norm_and_clip_equal_torch_on_one_process(pool: Pool, tp: int, pp: int, dp: int) -> None:
    layout = Layout.of(tp=tp, pp=pp, dp=dp)
    for tied, dtype in ((False, torch.float64), (True, torch.float64), (True, torch.float32)):
        config = replace(MODEL, tied=tied)
        params = _plain(config)
        norm = torch.nn.utils.clip_grad_norm_(params.values(), 0.3)
        found = pool.run(layout.world, _measure, layout, config, dtype)
        precision = {torch.float64: 1e-13, torch.float32: 2e-7}[dtype]
        for rank in found:
            assert torch.equal(rank.norm, found[0].norm), "ranks disagree on the bits"
            torch.testing.assert_close(rank.norm, norm, rtol=precision, atol=0)
            torch.testing.assert_close(rank.clipped.double(), torch.tensor(0.3).double(), rtol=1e-5, atol=0)
            for name, offsets, part in rank.gradient:
                where = tuple(slice(o, o + n) for o, n in zip(offsets, part.shape, strict=True))
                torch.testing.assert_close(part.double(), params[name].grad[where], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_partial_gradients_are_summed_where_declared(pool: Pool, tp: int, pp: int) -> None:
    """Each rank holds (1 + its rank on the axis) times the gradient: the sum over the holders is known."""
    layout = Layout.of(tp=tp, pp=pp)
    for failures in pool.run(layout.world, _partial, layout, replace(MODEL, tied=True)):
        assert failures == []


def test_short_gradients_are_not_clipped_and_zero_means_no_limit() -> None:
    with ParallelState.build(Layout.of(), World.single()) as state:
        net = nn.Module()
        param = declare(net, "w", ParamSpec((2,), Init()), dtype=torch.float64)
        with DataParallel({0: net}, state) as weights:
            for limit, length in ((6.0, 5.0), (0.0, 5.0), (2.0, 2.0)):
                weights.grad(param).copy_(torch.tensor([3.0, 4.0]))
                norm = grad_norm(weights)
                factor = clip_factor(norm, limit)
                assert (norm if factor is None else norm * factor).item() == pytest.approx(length, rel=1e-6)


@pytest.mark.parametrize("shape", [(), (1 << 16,), (1 << 10, 1 << 12)])
def test_long_fp32_gradients_do_not_lose_digits(shape: tuple[int, ...]) -> None:
    """Millions of squares added up in fp32 are off in the fourth digit, and differently in each layout."""
    with ParallelState.build(Layout.of(), World.single()) as state:
        net = nn.Module()
        param = declare(net, "w", ParamSpec(shape, Init()))
        with DataParallel({0: net}, state) as weights:
            normal_(weights.grad(param), seed=1, name="g", full_shape=shape, offsets=[0] * len(shape), std=1e-3)
            torch.testing.assert_close(grad_norm(weights), weights.grad(param).double().norm(), rtol=1e-6, atol=0)


def test_a_stage_without_parameters_takes_part(pool: Pool) -> None:
    """Its rank knows the norm like all others."""
    assert pool.run(2, _empty_stage, timeout=20.0) == [2.0, 2.0]


def test_infinite_gradients_give_an_infinite_norm() -> None:
    """And a NaN a NaN: nothing may hide it."""
    with ParallelState.build(Layout.of(), World.single()) as state:
        net = nn.Module()
        param = declare(net, "w", ParamSpec((2,), Init()))
        with DataParallel({0: net}, state) as weights:
            weights.grad(param)[0] = torch.inf
            assert grad_norm(weights).isinf()
            weights.grad(param)[0] = torch.nan
            assert grad_norm(weights).isnan()


def _gradient(part: Logical, dtype: torch.dtype) -> Tensor:
    """This rank's block of the one logical gradient."""
    out = torch.empty(part.block.shape, dtype=dtype)
    return normal_(out, seed=9, name=part.name, full_shape=part.spec.shape, offsets=part.block.offsets, std=0.7)


def _stage(layout: Layout, config: ModelConfig, state: ParallelState, dtype: torch.dtype) -> Transformer:
    pp, rank = layout.size("pp"), state.coords["pp"]
    per = -(-config.layers // pp)
    held = range(min(rank * per, config.layers), min((rank + 1) * per, config.layers))
    build = Build(state.axis("tp"), layout.size("tp") > 1, dtype)
    return Transformer(config, StageSpec.of(held, first=rank == 0, last=rank == pp - 1), build, seq_len=4)


def _plain(config: ModelConfig) -> dict[str, nn.Parameter]:
    """The same gradient on parameters that know of no layout."""
    layout = Layout.of()
    with ParallelState.build(layout, World.single()) as state:
        params = {}
        for part in (part for item in collect(_stage(layout, config, state, torch.float64)) for part in item.logical):
            params[part.name] = nn.Parameter(torch.empty(part.spec.shape, dtype=torch.float64))
            params[part.name].grad = _gradient(part, torch.float64)
    return params


def _measure(world: World, layout: Layout, config: ModelConfig, dtype: torch.dtype) -> Found:
    with (
        ParallelState.build(layout, world) as state,
        DataParallel({0: _stage(layout, config, state, dtype)}, state, bucket_mb=1e-3) as weights,
    ):
        for bucket in weights.all_buckets:
            bucket.grads.fill_(1e3)
        parts = _parts(weights)
        for part, view in parts:
            view.copy_(_gradient(part, dtype))
        norm = grad_norm(weights)
        factor = clip_factor(norm, 0.3)
        assert factor is not None
        for bucket in weights.all_buckets:
            bucket.grads.mul_(factor.to(bucket.grad_dtype))
        gradient = [(part.name, part.block.offsets, view.clone()) for part, view in parts]
        return Found(norm, grad_norm(weights), gradient)


def _partial(world: World, layout: Layout, config: ModelConfig) -> list[str]:
    failures = []
    with (
        ParallelState.build(layout, world) as state,
        DataParallel({0: _stage(layout, config, state, torch.float64)}, state) as weights,
    ):
        parts = _parts(weights)
        for part, view in parts:
            view.copy_(_gradient(part, torch.float64) * (1 + state.coords["tp"] + 10 * state.coords["pp"]))
        sum_partial_gradients(weights.gradients, state)
        for part, view in parts:
            want = _gradient(part, torch.float64) * _holders(part, layout, state.coords)
            if not torch.allclose(view, want, rtol=1e-13, atol=0):
                failures.append(f"{part.name} on rank {world.rank}: {(view / want).flatten()[:3].tolist()}")
    return failures


def _parts(weights: DataParallel) -> list[tuple[Logical, Tensor]]:
    """Each logical tensor and the part of the gradients that is this rank's block of it."""
    return [(part, part.view(weights.grad(item.param))) for item in weights.declared for part in item.logical]


def _holders(part: Logical, layout: Layout, coords: dict[str, int]) -> int:
    """The factors of the ranks over which this part is summed, added up, worked out by hand for each kind."""
    tp, pp, last = layout.size("tp"), 10 * coords["pp"], 10 * (layout.size("pp") - 1)
    mine = 1 + coords["tp"] + pp
    if "embed_tokens" in part.name:
        return mine if layout.size("pp") == 1 else 2 * (1 + coords["tp"]) + last
    shared_heads = tp == 4 and (".k_proj." in part.name or ".v_proj." in part.name)
    if shared_heads:
        return sum(1 + r + pp for r in range(tp) if r // 2 == coords["tp"] // 2)
    column = any(name in part.name for name in ("q_proj", "k_proj", "v_proj", "up_proj", "gate_proj", "lm_head"))
    cut = column or part.name.endswith(("o_proj.weight", "down_proj.weight"))
    return mine if cut else sum(1 + r + pp for r in range(tp))


def _empty_stage(world: World) -> float:
    with ParallelState.build(Layout.of(pp=2), world) as state:
        net = nn.Module()
        if world.rank == 0:
            declare(net, "w", ParamSpec((4,), Init()))
        with DataParallel({world.rank: net}, state) as weights:
            for bucket in weights.all_buckets:
                bucket.grads.fill_(1.0)
            return grad_norm(weights).item()
