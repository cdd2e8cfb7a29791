"""Gemms in fp8: the ones that are meant, as exact as the format allows, the same in every layout.

Activations are fp32 here, so that what differs is the FP8 alone and not how bf16 rounds their products.
Faults to catch: a scale that the ranks of tp do not agree on; gradients of activations in the format of the weights;
one scale for all rows; a weight that is not quantized anew after an update; weight gradients of later
microbatches not added; what is made again quantized by another scale; a scale that is no power of two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensor_parallel_full import compare, draw, full_grads, mine, set_full, where
from torch import Tensor, nn

from stretto.arguments import parse
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.params import Init, collect
from stretto.tensor_parallel import Build, ColumnParallelLinear, Pointwise, RowParallelLinear, formulas
from stretto.tensor_parallel.fp8 import E4M3, E5M2, RECIPES, quantize, quantize_rows, scale
from stretto.testing import Pool
from stretto.verify import build, random_batch, random_weights
from stretto.world import Axis, World

pytestmark = pytest.mark.gloo

S, B, IN, INNER, OUT = 8, 2, 32, 48, 16
SIZES = 2 ** torch.linspace(-7, 7, INNER, dtype=torch.float64)
ALONE = Axis.single("tp")
WORDS = (
    "--preset demo --hidden 32 --heads 4 --head-dim 16 --ffn 48 --layers 2 --vocab 61 --seq-len 16 --global-batch 4 "
)
WORDS += "--micro-batch 2 --dtype bf16 --tp 1 --pp 1 --nproc 1"

both_recipes = pytest.mark.parametrize("recipe", RECIPES)


class Pair(nn.Module):
    """Column, something between, row: what a feed-forward is made of."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(IN, INNER, build, bias=True, init=Init(std=1.0))
        self.down = RowParallelLinear(INNER, OUT, build, bias=True, init=Init(std=1.0))
        self.between = Pointwise.of(formulas.GELU, build)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.between(self.up(x)))
        return out


def place(tp: Axis, recipe: str | None, *, sp: bool = False, recompute: bool = False) -> Build:
    gemms = RECIPES[recipe](tp) if recipe else None
    return Build(tp, sp, torch.float32, recompute=recompute, gemms=gemms)


def pair(at: Build) -> Pair:
    """With features between the layers that are small at first and large at last, and count alike in all sums.

    Each rank of tp has some. Scales of its own, which are powers of two as well, would not round them otherwise, but
    keep more of them: digits below the smallest normal number of the whole.
    """
    model = Pair(at)
    set_full(model)
    larger = {"up.weight": SIZES[:, None], "up.bias": SIZES, "down.weight": 1 / SIZES}
    with torch.no_grad():
        for item in collect(model):
            for part in item.logical:
                if part.name in larger:
                    factor = larger[part.name].expand(part.spec.shape)
                    part.view(item.param.data).mul_(factor[where(part.block)])
    return model


def ran(at: Build) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """This rank's output and gradient of the input, and whole gradients of the weights."""
    model = pair(at)
    x = mine(draw((S, B, IN), "x").float(), at.tp, at.sequence_parallel).clone().requires_grad_()
    y = model(x)
    y.backward(mine(draw((S, B, OUT), "dy").float(), at.tp, at.sequence_parallel))
    assert x.grad is not None
    return {"y": y.detach(), "dx": x.grad}, full_grads(model, at.tp)


@given(
    largest=st.floats(2**-90, 2**120, width=32) | st.integers(-90, 120).map(lambda n: 1.75 * 2.0**n), up=st.booleans()
)
def test_a_scale_is_the_least_power_of_two_that_brings_the_largest_into_the_format(largest: float, up: bool) -> None:
    """Also for what is the largest of the format times a power of two, and for the next number after it."""
    x = torch.tensor([[0.0, -largest, largest / 3]])
    if up:
        x[0, 1] = torch.nextafter(x[0, 1], torch.tensor(-torch.inf))
    most = x.abs().max().item()
    for dtype in (E4M3, E5M2):
        (found,) = (unit := scale(x, dtype=dtype)).view(-1).tolist()
        assert math.frexp(found)[0] == 0.5
        assert torch.finfo(dtype).max / 2 < most / found <= torch.finfo(dtype).max
        assert torch.equal(quantize(x, unit, dtype=dtype).float(), (x / found).to(dtype).float())


def test_numbers_are_rounded_as_the_format_says() -> None:
    x = draw((40, 30), "x").float() * 1e-3
    for dtype, step in ((E4M3, 2**-4), (E5M2, 2**-3)):
        unit = scale(x, dtype=dtype)
        small = quantize(x, unit, dtype=dtype)
        # Half a unit in the last place; below the smallest normal number they stay as far apart.
        room = step * x.abs().clamp(min=(torch.finfo(dtype).smallest_normal * unit).item())
        assert ((small.float() * unit - x).abs() <= room).all()
    small, units = quantize_rows(x)
    assert units.shape == (40, 1)
    most = small.float().abs().amax(1)
    assert (most > torch.finfo(E4M3).max / 2 - 16).all()  # which rounding takes from it
    assert (most <= torch.finfo(E4M3).max).all()


def test_nothing_stays_nothing_and_what_is_no_number_none() -> None:
    for x, same in (
        (torch.zeros(4, 4), torch.zeros(4, 4)),
        (torch.full((4, 4), torch.nan), torch.full((4, 4), torch.nan)),
    ):
        assert torch.equal(quantize(x, scale(x, dtype=E4M3), dtype=E4M3).float().nan_to_num(7.0), same.nan_to_num(7.0))
        assert torch.equal(quantize_rows(x)[0].float().nan_to_num(7.0), same.nan_to_num(7.0))
    x = torch.ones(4, 4)
    x[2, 1] = torch.inf
    assert not quantize(x, scale(x, dtype=E4M3), dtype=E4M3).float()[2, 1].isfinite()


def rounded(x: Tensor, dtype: torch.dtype, dim: int | None = None) -> Tensor:
    """x as fp8 leaves it, with a scale for the tensor, or for all that shares a place outside `dim`; in fp64."""
    largest = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    unit = torch.exp2(torch.ceil(torch.log2(largest.double() / torch.finfo(dtype).max)))
    return (x / unit).float().to(dtype).double() * unit


@both_recipes
def test_the_three_products_are_those_of_rounded_factors(recipe: str) -> None:
    """Which format, and along which dim a scale holds, worked out anew from what each product sums over."""
    at = place(ALONE, recipe)
    layer = ColumnParallelLinear(IN, INNER, at, bias=False, init=Init(std=1.0))
    x, dy = (draw((S, B, n), name).float() for n, name in ((IN, "x"), (INNER, "dy")))
    x *= 2 ** torch.linspace(-14, 2, B)[:, None]  # tokens and features of all sizes
    w = layer.weight.detach()
    w.copy_(draw((INNER, IN), "w").float() * 2 ** torch.linspace(-12, 2, IN))
    x.requires_grad_()
    y = layer(x)
    y.backward(dy)
    flat, d = x.detach().reshape(-1, IN), dy.reshape(-1, INNER)
    if recipe == "tensorwise":
        wanted = {
            "y": rounded(flat, E4M3) @ rounded(w, E4M3).t(),
            "dx": rounded(d, E5M2) @ rounded(w, E4M3),
            "dw": rounded(d, E5M2).t() @ rounded(flat, E4M3),
        }
    else:
        wanted = {
            "y": rounded(flat, E4M3, 1) @ rounded(w, E4M3, 1).t(),
            "dx": rounded(d, E4M3, 1) @ rounded(w, E4M3, 0),
            "dw": d.double().t() @ flat.double(),
        }
    assert x.grad is not None
    found = {"y": y.detach().reshape(-1, INNER), "dx": x.grad.reshape(-1, IN), "dw": layer.weight.grad}
    # Each sum beside its own terms, so that small tokens and features count as much as large ones.
    terms = {"y": flat.abs() @ w.abs().t(), "dx": d.abs() @ w.abs(), "dw": d.abs().t() @ flat.abs()}
    beside = [{name: each[name] / terms[name] for name in terms} for each in (found, wanted)]
    compare(recipe, *beside, tolerance=1e-5)
    plain = {"y": flat.double() @ w.double().t(), "dx": d.double() @ w.double(), "dw": d.double().t() @ flat.double()}
    for name, exact in plain.items():
        error = ((found[name] - exact).norm() / exact.norm()).item()
        assert error < 0.08, (name, error)
        assert (error > 0.01) == (wanted[name] is not exact and not torch.equal(wanted[name], exact)), (name, error)


@pytest.mark.parametrize("tp", [2, 4])
@both_recipes
def test_a_layout_computes_what_one_process_does(pool: Pool, recipe: str, tp: int) -> None:
    """To rounding in fp32."""
    pool.run(tp, _in_layouts, recipe)


def _in_layouts(world: World, recipe: str) -> None:
    with ParallelState.build(Layout.of(tp=world.size), world) as state:
        tp = state.axis("tp")
        wanted, weights = ran(place(ALONE, recipe))
        for sp, recompute in product((False, True), repeat=2):
            found, grads = ran(place(tp, recipe, sp=sp, recompute=recompute))
            whole = {"y": mine(wanted["y"], tp, sp), "dx": mine(wanted["dx"], tp, sp)}
            compare(f"sp={sp} again={recompute}", found, whole, tolerance=1e-5)
            compare(f"sp={sp} again={recompute}", grads, weights, tolerance=1e-5)


@both_recipes
def test_what_is_made_again_is_narrowed_to_the_same_bits(recipe: str) -> None:
    kept, recompute = (ran(place(ALONE, recipe, recompute=recompute)) for recompute in (False, True))
    for one, other in zip(kept, recompute, strict=True):
        assert [name for name in one if not torch.equal(one[name], other[name])] == []


class Sums:
    """Accumulators in fp32 of one step."""

    def __init__(self) -> None:
        self.total: dict[nn.Parameter, Tensor] = {}

    def expect(self, weight: nn.Parameter) -> None:
        pass

    def add(self, weight: nn.Parameter, write: Callable[[Tensor, bool], object]) -> None:
        first_microbatch = weight not in self.total
        write(self.total.setdefault(weight, torch.full_like(weight, torch.nan, dtype=torch.float32)), first_microbatch)


@both_recipes
def test_weight_gradients_of_microbatches_add_up(recipe: str) -> None:
    sums = Sums()
    at = Build(ALONE, False, torch.float32, accumulators=sums, gemms=RECIPES[recipe](ALONE))
    model, single = pair(at), pair(place(ALONE, recipe))
    for k in range(3):
        for one in (model, single):
            one(draw((S, B, IN), f"x{k}").float()).backward(draw((S, B, OUT), f"dy{k}").float())
    for name in ("up", "down"):
        total, wanted = sums.total[getattr(model, name).weight], getattr(single, name).weight.grad
        compare(name, {name: total}, {name: wanted}, tolerance=2**-7 if recipe == "tensorwise" else 1e-6)


@pytest.mark.parametrize("recompute", ["selective", "block"])
@both_recipes
def test_recomputation_keeps_every_bit_of_a_step(recipe: str, recompute: str) -> None:
    kept, recompute = (_trained(f"--fp8 {recipe} --recompute {how}") for how in ("none", recompute))
    assert [name for name in kept if not torch.equal(kept[name], recompute[name])] == []


def _trained(words: str) -> dict[str, Tensor]:
    args = parse(f"{WORDS} {words}".split()).args
    with build(args, Layout.of(), World.single()) as session:
        session.load_full(random_weights(session, seed=0))
        for step in range(2):
            session.step(random_batch(args, seed=step))
        return {f"gradient of {n}": g for n, g in session.full_grads().items()} | session.full_params()


@both_recipes
def test_weights_are_narrowed_once_a_step_and_anew_in_the_next(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(f"{WORDS} --fp8 {recipe}".split()).args
    made = 0

    def counted(self: object, weight: Tensor, *, column: bool) -> object:
        nonlocal made
        made += 1
        return make(self, weight, column=column)

    make = RECIPES[recipe].make
    monkeypatch.setattr(RECIPES[recipe], "make", counted)
    batch = random_batch(args, seed=1)
    with build(args, Layout.of(), World.single()) as session, build(args, Layout.of(), World.single()) as other:
        session.load_full(random_weights(session, seed=0))
        session.step(batch)
        assert made == args.model.layers * 4  # two microbatches, forward and back
        other.load_full(session.full_params())
        assert session.evaluate(batch) == other.evaluate(batch)
        assert session.step(batch) == other.step(batch)
