"""Norms of heads with rotary embedding: the formula is its definition's gradient, and its kernels compute the formula.

Faults to catch: keys multiplied by the weights of queries; the mean over half of a head; angles of another sample;
the last tiles left out of a backward; gradients of values where those of keys are; one weight's gradient as both;
gradients rotated forward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton", reason="comes with torch for GPUs, and with what development installs on Linux")

from stretto.kernels.hand_written import hand_written, kernels
from stretto.kernels.unguarded import compiled
from stretto.models.frequencies import plain
from stretto.models.head_norm import norm_and_rotate, norm_and_rotate_backward
from stretto.models.rope import rotation

pytestmark = [pytest.mark.gloo, pytest.mark.gpu] if torch.cuda.is_available() else pytest.mark.gloo
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-3
ORDERS = [(1, 2, 0, 3), (0, 1, 2, 3), (2, 0, 1, 3)]
"""Of the dimensions s, b, heads and d in memory: attention leaves gradients in any of them."""


def given(
    s: int, b: int, heads: int, kv_heads: int, d: int, rotated: int, own: bool, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """What the forward takes but the number of heads, and gradients of q, k and v. With positions of their `own`
    samples begin at another one each."""
    torch.manual_seed(7)
    draw = partial(torch.randn, dtype=dtype, device=DEVICE)
    cos, sin = rotation(s + b, plain(rotated, 100.0), dtype=dtype, device=DEVICE)
    at = torch.arange(s, device=DEVICE)[:, None] + torch.arange(b if own else 1, device=DEVICE)
    gradients = []
    for count, order in zip((heads, kv_heads, kv_heads), ORDERS, strict=True):
        shape = s, b, count, d
        gradients.append(draw([shape[n] for n in order]).permute([order.index(n) for n in range(4)]))
    return [draw(s, b, heads + 2 * kv_heads, d), draw(d), draw(d), cos[at, 0], sin[at, 0]], gradients


def definition(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, centre: float
) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads, half = (qkv.shape[2] - heads) // 2, cos.shape[-1] // 2
    q, k, v = qkv[:, :, :heads], qkv[:, :, heads : heads + kv_heads], qkv[:, :, heads + kv_heads :]
    c, z = cos[..., :half], sin[..., :half]
    made = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        n = x / ((x**2).mean(-1, keepdim=True) + EPS).sqrt() * (centre + weight)
        low, high, rest = n[..., :half], n[..., half : 2 * half], n[..., 2 * half :]
        made.append(torch.cat([low * c - high * z, high * c + low * z, rest], -1))
    return made[0], made[1], v


@pytest.mark.parametrize("centre", [0.0, 1.0])
@pytest.mark.parametrize(("d", "rotated", "own"), [(8, 8, False), (10, 10, True), (8, 4, False), (16, 12, True)])
def test_the_formula_is_the_definition_with_its_gradients(d: int, rotated: int, own: bool, centre: float) -> None:
    tensors, gradients = given(3, 2, 6, 3, d, rotated, own, torch.float64)
    leaves = [x.requires_grad_() for x in tensors[:3]]
    made = definition(*leaves, *tensors[3:], 6, centre)
    exact = torch.autograd.grad(made, leaves, gradients)
    bound = {"eps": EPS, "centre": centre}
    found = [*norm_and_rotate(*tensors, 6, **bound), *norm_and_rotate_backward(*tensors, *gradients, **bound)]
    torch.testing.assert_close(found, [*made[:2], *exact])


SIZES = [(3, 2, 4, 2, 8), (21, 2, 8, 2, 64), (5, 1, 5, 1, 32), (9, 1, 5, 2, 256), (67, 1, 16, 8, 16)]
"""One tile and several, of which none are full; more of them than programs; heads of one token and of many."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("own", "centre"), [(False, 0.0), (True, 1.0)])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_kernels_compute_the_formula(
    sizes: tuple[int, int, int, int, int], own: bool, centre: float, dtype: torch.dtype
) -> None:
    tensors, gradients = given(*sizes, sizes[-1], own, dtype)
    heads, bound = sizes[2], {"eps": EPS, "centre": centre}
    there = norm_and_rotate, [*tensors, heads]
    back = norm_and_rotate_backward, [*tensors, *gradients]
    for formula, arguments in (there, back):
        exact = formula(*(x.double() if isinstance(x, Tensor) else x for x in arguments), **bound)
        found = kernels()[formula].run(*arguments, **bound)
        limit = 2**-7 if dtype == torch.bfloat16 else 1e-6  # the interpreter cuts bits off, it does not round
        for one, other in zip(found, exact, strict=True):
            assert (one.dtype, one.shape) == (dtype, other.shape)
            assert (one.double() - other).norm() <= limit * other.norm()


def test_heads_that_are_rotated_in_part_are_left_to_the_compiler() -> None:
    """And those of which the halves are no power of two, and gradients whose last dimension is spread out."""

    def chosen(formula: Callable[..., Any], *arguments: Any) -> str:
        """Of tensors of a GPU, which need not be there."""
        kernel = kernels()[formula]
        with FakeTensorMode():
            on_gpu = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in arguments]
            return "kernel" if kernel.takes(on_gpu) else "compiler"

    whole, gradients = given(3, 2, 6, 3, 8, 8, False, torch.bfloat16)
    assert chosen(norm_and_rotate, *whole) == "kernel"
    assert chosen(norm_and_rotate_backward, *whole, *gradients) == "kernel"
    spread = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in gradients]
    assert chosen(norm_and_rotate_backward, *whole, *spread) == "compiler"
    for d, rotated in ((8, 4), (10, 10)):
        part, gradients = given(3, 2, 6, 3, d, rotated, False, torch.bfloat16)
        assert chosen(norm_and_rotate, *part) == "compiler"
        assert chosen(norm_and_rotate_backward, *part, *gradients) == "compiler"
    wide, _ = given(3, 2, 6, 3, 8, 8, False, torch.float64)
    bound = partial(norm_and_rotate, eps=EPS, centre=0.0)
    assert hand_written(bound, lambda *_: "compiler")(*wide, 6) == "compiler"


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_the_compiler_computes_the_formula() -> None:
    """Of heads that are rotated in part, as in GLM 4.5."""
    tensors, gradients = given(3, 2, 6, 3, 16, 8, False, torch.float64)
    for formula, more in ((norm_and_rotate, (6,)), (norm_and_rotate_backward, gradients)):
        bound = partial(formula, eps=EPS, centre=0.0)
        torch.testing.assert_close(compiled(bound)(*tensors, *more), bound(*tensors, *more))
