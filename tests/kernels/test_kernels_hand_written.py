"""Kernels written by hand compute their formulas: on a GPU, and anywhere else in Triton's interpreter.

Faults to catch: the last rows left out; the gradient of what goes past lost; an output of attention that is not
weighed; the end of a row that is not a whole block
left out; heads that are not turned turned back.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="comes with torch for GPUs, and with what development installs on Linux")

from stretto.context_parallel import merge_
from stretto.distributed import rules
from stretto.experts import rows as moving
from stretto.experts.grouped import add_products
from stretto.experts.router import best
from stretto.kernels import hand_written
from stretto.kernels.hand_written import kernels
from stretto.models import rope
from stretto.models.frequencies import plain
from stretto.models.head_norm import norm_and_rotate, norm_and_rotate_backward
from stretto.tensor_parallel import Pointwise, formulas, fp8, fp8_shards, loss_formulas

pytestmark = [pytest.mark.gloo, pytest.mark.gpu] if torch.cuda.is_available() else pytest.mark.gloo
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE)


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """What the interpreter cuts off may add up: one draw in some hundreds comes near to a limit."""
    torch.manual_seed(7)


def same(found: tuple[Tensor, ...], exact: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    assert len(found) == len(exact)
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == dtype
        assert one.shape == other.shape
        limit = 2**-7 if dtype == torch.bfloat16 else 1e-6  # the interpreter cuts bits off, it does not round
        assert (one.double() - other).norm() <= limit * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner", [8, 1000, 1024, 2056])
@pytest.mark.parametrize("formula", [formulas.swiglu_backward, formulas.swiglu_both])
def test_swiglu(formula: Callable[..., tuple[Tensor, ...]], inner: int, dtype: torch.dtype) -> None:
    dy, gate_up = drawn(3, 2, inner, dtype=dtype), drawn(3, 2, 2 * inner, dtype=dtype)
    exact = formula(dy.double(), gate_up.double())
    found = kernels()[formula].run(dy, gate_up)
    same(found, exact, dtype)
    assert found[-1].data_ptr() == gate_up.data_ptr()  # no second one of that size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inner"), [(5, 24), (3, 1000), (2, 2056), (0, 8)])
def test_swiglu_of_rows_that_count_with_a_weight(rows: int, inner: int, dtype: torch.dtype) -> None:
    """Held against autograd, too: with dy the gradient of the sum of weight times output."""
    dy, gate_up = drawn(rows, inner, dtype=dtype), drawn(rows, 2 * inner, dtype=dtype)
    weight = torch.rand(rows, 1, device=DEVICE)
    exact = formulas.swiglu_weighted(dy.double(), gate_up.double(), weight.double())
    x, w = gate_up.double().requires_grad_(), weight.double().requires_grad_()
    y = w * formulas.swiglu(x)
    y.backward(dy.double())
    for one, other in zip(exact, (y.detach(), x.grad, w.grad), strict=True):
        torch.testing.assert_close(one, other)
    *found, dweight = kernels()[formulas.swiglu_weighted].run(dy, gate_up, weight)
    same(tuple(found), exact[:2], dtype)
    limit = 2**-5 if dtype == torch.bfloat16 else 2e-6  # of outputs that are rounded, whose sum may be next to nothing
    assert (dweight.double() - exact[2]).norm() <= limit * (dy.double() * formulas.swiglu(x.detach())).norm()
    assert found[1].data_ptr() == gate_up.data_ptr()


def test_what_is_used_up_cannot_be_used_again() -> None:
    """The gradient lies where the input was: a second backward, or another use of it, must not read that unawares."""
    gate_up = drawn(2, 8, dtype=torch.float32).requires_grad_()
    operation = Pointwise(formulas.swiglu, kernels()[formulas.swiglu_backward].run, unfused, recompute=False)
    held = gate_up * 1
    y, other = operation.now(held), held.square()
    y.sum().backward(retain_graph=True)
    for recompute in (y, other):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            recompute.sum().backward()


NORMS = [
    formulas.rms_norm_backward,
    formulas.rms_norm_both,
    formulas.zero_centered_rms_norm_backward,
    formulas.zero_centered_rms_norm_both,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dresidual", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 64), (7, 100), (700, 128), (5, 2048), (3, 2056)])
@pytest.mark.parametrize("formula", NORMS)
def test_rms_norm(
    formula: Callable[..., tuple[Tensor, ...]], rows: int, width: int, dresidual: bool, dtype: torch.dtype
) -> None:
    dy, x, weight = (drawn(*shape, dtype=dtype) for shape in [(rows, 2, width), (rows, 2, width), (width,)])
    more = {"dresidual": drawn(rows, 2, width, dtype=dtype)} if dresidual else {}
    exact = formula(dy.double(), x.double(), weight.double(), eps=1e-5, **{k: t.double() for k, t in more.items()})
    same(kernels()[formula].run(dy, x, weight, eps=1e-5, **more), exact, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "heads", "n", "width"), [(1, 4, 9, 16), (2, 3, 70, 24), (1, 1, 1, 8), (2, 2, 0, 8)])
def test_two_outputs_of_attention_are_merged(rows: int, heads: int, n: int, width: int, dtype: torch.dtype) -> None:
    """In any order in memory, some of the queries of one and all of another; of a query that saw no key nothing."""
    one = drawn(rows, heads, n + 3, width, dtype=dtype)[:, :, 2 : n + 2]
    two = drawn(rows, n, heads, width, dtype=dtype).transpose(1, 2)
    lses = [4 * drawn(rows, heads, n, dtype=torch.float32), 4 * drawn(rows, heads, n + 1, dtype=torch.float32)[..., 1:]]
    for lse, share in zip(lses, (3, 4), strict=True):
        lse[torch.rand(lse.shape, device=DEVICE) < 1 / share] = -torch.inf
    for wide in {dtype, torch.float32}:  # as it is in the end, and while there is more to come
        y = torch.full((n, rows, heads, width), torch.nan, dtype=wide, device=DEVICE).permute(1, 2, 0, 3)
        lse = torch.full((rows, heads, n), torch.nan, device=DEVICE)
        exact, exact_lse = y.double().contiguous(), lse.double()
        merge_(exact, exact_lse, one.double(), lses[0].double(), two.double(), lses[1].double())
        kernels()[merge_].run(y, lse, one, lses[0], two, lses[1])
        same((y,), (exact,), wide)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)


HEADS = [(4, 2, 2), (20, 20, 20), (5, 0, 0), (33, 1, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS)
def test_heads_are_turned_in_place(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    x = drawn(3, 2, sum(heads), 8, dtype=dtype)
    cos, sin = rope.rotation(5, plain(8, 100.0), dtype=dtype, device=DEVICE)
    cos, sin = cos[:3], sin[:3]
    exact = x.double()
    rope.apply_rotary_(exact, cos.double(), sin.double(), heads[0] + heads[1])
    kernels()[rope.apply_rotary_].run(x, cos, sin, heads[0] + heads[1])
    same((x,), (exact,), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_share_of_each_head_is_turned(dtype: torch.dtype) -> None:
    """The first features; the others stay, and so do their gradients."""
    x = drawn(3, 2, 6, 16, dtype=dtype)
    cos, sin = rope.rotation(3, plain(8, 100.0), dtype=dtype, device=DEVICE)
    exact = x.double()
    rope.apply_rotary_(exact, cos.double(), sin.double(), 4)
    assert torch.equal(exact[..., 8:], x[..., 8:].double())
    kernels()[rope.apply_rotary_].run(x, cos, sin, 4)
    same((x,), (exact,), dtype)
    parts = [drawn(3, 2, 4, 16, dtype=dtype), drawn(3, 2, 2, 16, dtype=dtype)]
    found = kernels()[rope.apply_rotary_backward].run(cos, sin, 1, *parts)
    exact = rope.apply_rotary_backward(cos.double(), sin.double(), 1, *(part.double() for part in parts))
    same((found,), (exact,), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotated", [1, 2])
@pytest.mark.parametrize("heads", HEADS)
def test_gradients_are_turned_back_side_by_side(heads: tuple[int, int, int], rotated: int, dtype: torch.dtype) -> None:
    """They come in whatever order attention leaves them in."""
    orders = [(2, 0, 1, 3), (0, 1, 2, 3), (1, 2, 0, 3)]
    sizes = {"s": 3, "b": 2, "d": 8}
    parts = []
    for count, order in zip([n for n in heads if n], orders, strict=False):
        shape = [sizes["s"], sizes["b"], count, sizes["d"]]
        lies = drawn(*(shape[n] for n in order), dtype=dtype)
        parts.append(lies.permute(*(order.index(n) for n in range(4))))
        assert parts[-1].shape == tuple(shape)
    cos, sin = rope.rotation(3, plain(8, 100.0), dtype=dtype, device=DEVICE)
    found = kernels()[rope.apply_rotary_backward].run(cos, sin, rotated, *parts)
    exact = rope.apply_rotary_backward(cos.double(), sin.double(), rotated, *(part.double() for part in parts))
    same((found,), (exact,), dtype)


def test_every_kernel_is_compared() -> None:
    compared = {formulas.swiglu_backward, formulas.swiglu_both, *NORMS}
    elsewhere = {fp8.add_, fp8.scale, fp8.quantize, fp8.quantize_transposed, fp8.quantize_both, fp8.quantize_rows}
    compared |= {formulas.swiglu_weighted}
    elsewhere |= {fp8_shards.quantize_, fp8_shards.transpose_}
    elsewhere |= {norm_and_rotate, norm_and_rotate_backward}
    elsewhere |= {loss_formulas.statistics, loss_formulas.gradient_, formulas.add_rows_}
    elsewhere |= {rules.adamw, rules.adamw_weights, merge_}
    elsewhere |= {moving.scatter_rows, moving.sum_rows, moving.combine_rows, moving.by_expert}
    elsewhere |= {moving.sort_assignments, add_products, best}
    assert set(kernels()) == compared | {rope.apply_rotary_, rope.apply_rotary_backward} | elsewhere


def test_what_no_kernel_takes_goes_where_it_went_before() -> None:
    """fp64, for one: kernels compute in fp32."""
    dy, gate_up = drawn(2, 4, dtype=torch.float64), drawn(2, 8, dtype=torch.float64)
    chosen = hand_written(formulas.swiglu_backward, lambda *_: "compiled")
    assert chosen(dy, gate_up) == "compiled"
    assert hand_written(formulas.swiglu, unfused) is unfused


def unfused(*_: Tensor) -> None:
    raise AssertionError("it was not to be called")
