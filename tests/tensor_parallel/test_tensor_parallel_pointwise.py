"""Operations in front of a GEMM: their adjoints, and a product that makes its input itself.

Faults to catch: an adjoint of SwiGLU without the slope of its sigmoid; an adjoint of the other form of GELU; an adjoint
of RMSNorm that takes the mean square for a constant; an adjoint of LayerNorm that takes the mean for a constant; a
gradient of a norm's weight that forgets to normalise; an input that is made again in less precision; a way past an
operation that gives no gradient; a bias without gradient where the input is made; a weight whose gradient alone is
wanted, hidden from autograd; a second gradient of a weight that overwrites the first; a first gradient of a step that
is added to what is there; narrow products that are added up narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stretto.tensor_parallel import Build, Lazy, Pointwise, formulas
from stretto.tensor_parallel.linear import accumulate_matmul, linear
from stretto.world import Axis

pytestmark = pytest.mark.gloo

BUILD = Build(Axis.single("tp"), False, torch.float64)
EPS = 1e-5


def rms(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], w, EPS)


def layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w, b, EPS)


def gated(x: Tensor) -> Tensor:
    return F.silu(x[..., :4]) * x[..., 4:]


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


Case = tuple[formulas.Formula, dict[str, float], Callable[..., Tensor], int]
CASES: dict[str, Case] = {
    "swiglu": (formulas.SWIGLU, {}, gated, 0),
    "gelu": (formulas.GELU, {}, F.gelu, 0),
    "gelu-tanh": (formulas.GELU_TANH, {}, tanh_gelu, 0),
    "rms": (formulas.RMS_NORM, {"eps": EPS}, rms, 1),
    "layer": (formulas.LAYER_NORM, {"eps": EPS}, layer, 2),
}


def inputs(vectors: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(5, 2, 8), *[(8,)] * vectors]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


@pytest.mark.parametrize("name", CASES)
def test_the_adjoint_is_torchs(name: str) -> None:
    formula, bound, plain, vectors = CASES[name]
    args = inputs(vectors)
    y, want = Pointwise.of(formula, BUILD, **bound).now(*args), plain(*args)
    torch.testing.assert_close(y, want, rtol=1e-13, atol=1e-13)
    dy = torch.randn_like(want)
    for found, wanted in zip(torch.autograd.grad(y, args, dy), torch.autograd.grad(want, args, dy), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("formula", "golden"),
    [
        # x Phi(x), by Python's math.erf.
        (formulas.GELU, lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2),
        # x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2
        (formulas.GELU_TANH, lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2),
    ],
)
def test_each_form_of_gelu_is_its_equation(formula: formulas.Formula, golden: Callable[[float], float]) -> None:
    """Fault to catch: one form under the other's name. They are up to 4.7e-4 apart."""
    points = [-4.0, -2.3, -0.7, 0.0, 0.3, 1.9, 2.7]
    y = formula.forward(torch.tensor(points, dtype=torch.float64))
    assert y.tolist() == pytest.approx([golden(x) for x in points], abs=1e-14)


class Sum:
    """Accumulators for one weight."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight, self.first_microbatch = weight, True
        self.total = torch.full_like(weight, torch.nan, requires_grad=False)

    def expect(self, weight: nn.Parameter) -> None:
        raise AssertionError(f"a layer expects {weight.shape}, not the product")

    def add(self, weight: nn.Parameter, write: Callable[[Tensor, bool], object]) -> None:
        assert weight is self.weight
        write(self.total, self.first_microbatch)
        self.first_microbatch = False


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_product_that_makes_its_input_is_the_product_of_it(name: str, direct: bool) -> None:
    formula, bound, plain, vectors = CASES[name]
    args, width = inputs(vectors), 4 if name == "swiglu" else 8
    weight, bias = nn.Parameter(torch.randn(3, width).double()), nn.Parameter(torch.randn(3).double())
    sums = Sum(weight)
    build = replace(BUILD, recompute=True, accumulators=sums if direct else None)
    lazy = Pointwise.of(formula, build, **bound)(*args)
    assert isinstance(lazy, Lazy)
    given = [*args, bias] if direct else [*args, bias, weight]
    want = F.linear(plain(*args), weight, bias)
    dy = torch.randn_like(want)
    wanted = torch.autograd.grad(want, [*args, bias, weight], dy)
    for _ in range(2 if direct else 1):  # a second backward adds
        y = linear(lazy, weight, bias, build, column=True)
        torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
        found = torch.autograd.grad(y, given, dy, allow_unused=direct)
    if direct:
        found = (*found, sums.total / 2)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", [False, True])
def test_autograd_sees_a_weight_where_no_input_wants_a_gradient(wanted: bool) -> None:
    """Elsewhere its hooks are not called in a backward that has nothing for it."""
    x, weight = torch.randn(4, 8).double(), nn.Parameter(torch.randn(3, 8).double())
    visits: list[Tensor | None] = []
    weight.register_post_accumulate_grad_hook(lambda w: visits.append(w.grad))
    sums = Sum(weight)
    y = linear(x.requires_grad_(wanted), weight, None, replace(BUILD, accumulators=sums), column=True)
    dy = torch.randn_like(y)
    y.backward(dy)
    torch.testing.assert_close(sums.total, dy.T @ x, rtol=1e-12, atol=1e-12)
    assert visits == ([] if wanted else [None])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["rms", "layer"])
def test_what_goes_past_is_the_input_and_its_gradient_is_added(name: str, recompute: bool) -> None:
    formula, bound, plain, vectors = CASES[name]
    args = inputs(vectors)
    build = replace(BUILD, recompute=recompute)
    weight = nn.Parameter(torch.randn(3, 8).double())
    with_residual = Pointwise.of(formula, build, **bound).with_residual(*args)
    if recompute:
        with pytest.raises(RuntimeError, match="when a GEMM has taken"):
            _ = with_residual.residual
    y = linear(with_residual.output, weight, None, build, column=True)
    assert torch.equal(with_residual.residual, args[0])
    (y.sin().sum() + with_residual.residual.square().sum()).backward()
    want = inputs(vectors)
    (F.linear(plain(*want), weight).sin().sum() + want[0].square().sum()).backward()
    for one, other in zip(args, want, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", ["output", "residual"])
def test_one_way_of_a_fork_may_be_left(way: str) -> None:
    formula, bound, plain, vectors = CASES["rms"]
    args = inputs(vectors)
    with_residual = Pointwise.of(formula, BUILD, **bound).with_residual(*args)
    taken = getattr(with_residual, way)
    (taken * taken).sum().backward()
    want = inputs(vectors)
    (plain(*want) if way == "output" else want[0]).square().sum().backward()
    for one, other in zip(args, want, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_narrow_products_are_added_up_wide() -> None:
    """256 + 1 in bf16 stays 256."""
    total = torch.full((1, 1), 256.0)
    accumulate_matmul(total, False, torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16))
    assert total.item() == 257.0
