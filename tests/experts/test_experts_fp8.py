"""Products of experts in fp8: those of rounded factors, the same wherever an expert is computed.

Faults to catch: one scale for the columns of all experts; a cut expert whose ranks do not agree on a scale; weights of
experts that are not quantized anew after an update.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from experts_models import MIXTRAL, arguments, layout_of
from torch import Tensor

from stretto.arguments import ConfigError, parse
from stretto.collectives import all_reduce
from stretto.experts import SparseFeedForward, expert_axes
from stretto.experts.fp8 import GroupedFp8
from stretto.experts.grouped import GroupedLinear, Joined
from stretto.experts.segments import Segments
from stretto.layout import Layout
from stretto.parallel_state import ParallelState, default_axes
from stretto.params import Init, ParamSpec, collect, fill
from stretto.tensor_parallel import Build, Pointwise, formulas
from stretto.testing import Pool
from stretto.verify import build, random_batch, random_weights
from stretto.world import Axis, World

pytestmark = pytest.mark.gloo

E4M3 = torch.float8_e4m3fn
ROWS, IN, OUT = (5, 0, 9), 32, 48
WORDS = (
    "--preset tiny-moe --nproc 1 --dp 1 --ep 1 --dtype bf16 --hidden 32 --heads 2 --head-dim 16 --ffn 48 "
    "--expert-ffn 48 --layers 2 --vocab 61 --tokenizer byte --seq-len 16 --micro-batch 1 --global-batch 2 --fp8 "
)


def rounded(x: Tensor, dim: int) -> Tensor:
    """Numbers of e4m3 times the least power of two that brings the largest along `dim` into the format, in fp64."""
    unit = 2 ** torch.ceil(torch.log2(x.double().abs().amax(dim, keepdim=True) / 448))
    return (x.double() / unit).float().to(E4M3).double() * unit


def test_the_products_are_those_of_rounded_factors() -> None:
    """Experts of very different sizes, one without rows."""
    fp8 = GroupedFp8(Axis.single("etp"), len(ROWS))
    place = Build(Axis.single("tp"), False, torch.float32, experts_fp8=fp8)
    specs = [ParamSpec((OUT, IN), Init(std=1.0), part=str(e)) for e in range(len(ROWS))]
    layer = GroupedLinear(specs, [], len(ROWS), place, column=True, fp8=fp8)
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(len(ROWS), OUT, IN, generator=generator) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    layer.weight.data.copy_(w.view(-1, IN))
    x = torch.randn(sum(ROWS), IN, generator=generator).requires_grad_()
    dy = torch.randn(sum(ROWS), OUT, generator=generator)
    ends = torch.tensor(ROWS).cumsum(0).to(torch.int32)
    y = layer(x, Segments(lambda: [list(ROWS)], ends), Joined(1))
    y.backward(dy)
    assert x.grad is not None
    assert layer.weight.grad is not None
    parts = zip(w, *(t.split(ROWS) for t in (x.detach(), dy, y, x.grad)), layer.weight.grad.view_as(w), strict=True)
    for w_e, x_e, dy_e, y_e, dx_e, dw_e in parts:
        torch.testing.assert_close(y_e.double(), rounded(x_e, 1) @ rounded(w_e, 1).t(), rtol=1e-5, atol=1e-5)
        scale = float(w_e.abs().max())
        dx = rounded(dy_e, 1) @ rounded(w_e, 0)
        torch.testing.assert_close(dx_e.double() / scale, dx / scale, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dw_e, dy_e.t() @ x_e, rtol=1e-5, atol=1e-5)


def _outputs(world: World, ep: int, etp: int) -> list[Tensor]:
    """Of this rank's own tokens, the same ones in every layout: what a layer gives, and the gradient of its input."""
    args = arguments(MIXTRAL, dp=4, ep=ep, etp=etp, dtype="fp32")
    config = replace(args.model, hidden=64, expert_ffn=64, top_k=3)
    layout = layout_of(args)
    with ParallelState.build(layout, world, axes=default_axes(layout, experts=True)) as state:
        axes = expert_axes(state)
        fp8 = GroupedFp8(axes.etp, config.experts // ep)
        place = Build(state.axis("tp"), False, torch.float32, experts=axes, experts_fp8=fp8)
        act = Pointwise.of(formulas.SWIGLU, place)
        layer = SparseFeedForward(config, place, act, lambda _: torch.nn.Identity(), out_init=Init(std=0.02))
        fill(collect(torch.nn.ModuleDict({"mlp": layer})), 7, lambda p: p.data)
        x = torch.randn(33, 2, 64, generator=torch.Generator().manual_seed(world.rank)).requires_grad_()
        y = layer(x)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(9)))
        assert x.grad is not None
        return [y.detach(), x.grad]


def test_a_row_has_its_scale_wherever_it_is_computed(pool: Pool) -> None:
    """To rounding in fp32: another scale is a thousand times as far away."""
    alone, *others = (pool.run(4, _outputs, *sizes) for sizes in ((1, 1), (4, 1), (2, 2)))
    for found in others:
        for mine, wanted in zip(found, alone, strict=True):
            for a, b in zip(mine, wanted, strict=True):
                assert float((a - b).abs().max() / b.abs().max()) < 1e-5


def _cut(world: World) -> None:
    """Rows whose first half is so large that of the second little is left in their unit, with weights the other way
    round: products of parts add up to those of whole rows."""
    generator = torch.Generator().manual_seed(4)
    sizes = torch.cat([torch.full((IN,), 2.0**10), torch.full((IN,), 2.0**-5)])
    x, w = torch.randn(sum(ROWS), 2 * IN, generator=generator), torch.randn(3, OUT, 2 * IN, generator=generator)
    x, w = x * sizes, w / sizes
    rows = Segments(lambda: [list(ROWS)], torch.tensor(ROWS).cumsum(0).to(torch.int32))
    mine = slice(world.rank * IN, (world.rank + 1) * IN)
    with ParallelState.build(Layout.of(tp=2), world) as state:
        axis = state.axis("tp")
        down, up = (torch.nn.Parameter(t) for t in (w, w.transpose(1, 2)))
        alone, cut = GroupedFp8(Axis.single("etp"), 3), GroupedFp8(axis, 3)
        for whole, weight, part, column in (
            (alone.times, down, w[:, :, mine], False),
            (alone.back, up, up[:, mine], True),
        ):
            held = torch.nn.Parameter(part.reshape(-1, part.shape[-1]))
            compute = cut.back if column else cut.times
            found = all_reduce(compute(x[:, mine].contiguous(), held, rows, column=column), axis)
            wanted = whole(x, torch.nn.Parameter(weight.reshape(-1, weight.shape[-1])), rows, column=column)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


def test_ranks_that_cut_an_expert_agree_on_its_scales(pool: Pool) -> None:
    """Of rows in the forward, of gradients in the backward."""
    pool.run(2, _cut)


@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise"])
def test_a_run_quantizes_its_experts_once_a_step_and_anew_in_the_next(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers of two matrices, two microbatches; the loss is not that of bf16, and falls as that does."""
    made, make = [], GroupedFp8.make
    monkeypatch.setattr(GroupedFp8, "make", lambda *args, **kwargs: made.append(0) or make(*args, **kwargs))
    losses = {}
    for words in (recipe, "none"):
        args = parse(f"{WORDS} {words} --lr 0.05 --warmup-steps 0".split(), env={}, files=False).args
        with build(args, Layout.of(), World.single()) as session:
            session.load_full(random_weights(session, 3))
            batch = random_batch(args, 1)
            losses[words] = [session.step(batch)[0] for _ in range(4)]
    assert len(made) == 4 * 2 * 2
    fp8, plain = losses[recipe], losses["none"]
    assert fp8[0] != plain[0]
    assert fp8[0] == pytest.approx(plain[0], rel=0.02)
    assert fp8[3] < fp8[0] - 0.5 * (plain[0] - plain[3])


def test_sizes_must_divide() -> None:
    with pytest.raises(ConfigError, match=r"expert_ffn/etp = 40/1 = 40: must be a multiple of 16 for fp8"):
        parse(f"{WORDS} rowwise --expert-ffn 40".split(), env={}, files=False)
