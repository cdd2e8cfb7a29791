"""Heads turned in place, and gradients turned back as they are put side by side.

A compiler that puts three tensors side by side asks for every element of the result which of them it comes from, and
reads each of a turned head's halves twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stretto.kernels.launches import Launches
from stretto.models import rope as formula

_HEADS = 16
"""Heads of a program: of 128 features, each thread of four warps has 16 bytes of either half."""


@Launches
@triton.jit  # which reads annotations, and knows no types but its own
def _turn(x, cos, sin, heads, blocks, batch, stride_s, stride_b, stride_h, half: tl.constexpr, count: tl.constexpr):
    token = tl.program_id(0) // blocks
    s, b = (token // batch).to(tl.int64), (token % batch).to(tl.int64)
    head = tl.program_id(0) % blocks * count + tl.arange(0, count)
    pair = tl.arange(0, half)
    c = tl.load(cos + s * 2 * half + pair).to(tl.float32)[None, :]
    z = tl.load(sin + s * 2 * half + pair).to(tl.float32)[None, :]
    at = x + s * stride_s + b * stride_b + head[:, None] * stride_h + pair[None, :]
    inside = (head < heads)[:, None]
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (low * c - high * z).to(x.dtype.element_ty), mask=inside)
    tl.store(at + half, (high * c + low * z).to(x.dtype.element_ty), mask=inside)


@triton.jit
def _part(x, head, first, heads, s, b, pair, stride_s, stride_b, stride_h, half: tl.constexpr):
    """Both halves of those heads that lie in one part, and zeros for the others."""
    inside = ((head >= first) & (head < first + heads))[:, None]
    at = x + s * stride_s + b * stride_b + (head - first)[:, None] * stride_h + pair[None, :]
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return low, tl.load(at + half, mask=inside, other=0.0).to(tl.float32)


@Launches
@triton.jit
def _back(
    out,
    cos,
    sin,
    one,
    two,
    three,
    heads_one,
    heads_two,
    heads_three,
    rotated,
    blocks,
    batch,
    one_s,
    one_b,
    one_h,
    two_s,
    two_b,
    two_h,
    three_s,
    three_b,
    three_h,
    half: tl.constexpr,
    count: tl.constexpr,
):
    token = tl.program_id(0) // blocks
    s, b = (token // batch).to(tl.int64), (token % batch).to(tl.int64)
    head = tl.program_id(0) % blocks * count + tl.arange(0, count)
    pair = tl.arange(0, half)
    heads = heads_one + heads_two + heads_three
    low, high = _part(one, head, 0, heads_one, s, b, pair, one_s, one_b, one_h, half)
    more = _part(two, head, heads_one, heads_two, s, b, pair, two_s, two_b, two_h, half)
    rest = _part(three, head, heads_one + heads_two, heads_three, s, b, pair, three_s, three_b, three_h, half)
    low, high = low + more[0] + rest[0], high + more[1] + rest[1]
    still = (head >= rotated)[:, None]
    c = tl.where(still, 1.0, tl.load(cos + s * 2 * half + pair).to(tl.float32)[None, :])
    z = tl.where(still, 0.0, tl.load(sin + s * 2 * half + pair).to(tl.float32)[None, :])
    at = out + (token.to(tl.int64) * heads + head[:, None]) * 2 * half + pair[None, :]
    inside = (head < heads)[:, None]
    tl.store(at, (low * c + high * z).to(out.dtype.element_ty), mask=inside)
    tl.store(at + half, (high * c - low * z).to(out.dtype.element_ty), mask=inside)


def apply_rotary_(x: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> None:
    """`stretto.models.rope.apply_rotary_`."""
    length, batch = x.shape[:2]
    if cos.shape[1] != 1:  # rows of several documents, whose tokens have positions of their own
        formula.apply_rotary_(x, cos, sin, rotated)
        return
    blocks = triton.cdiv(rotated, _HEADS)
    _turn[(length * batch * blocks,)](
        x, cos, sin, rotated, blocks, batch, *x.stride()[:3], cos.shape[-1] // 2, _HEADS, num_warps=4
    )


def apply_rotary_backward(cos: Tensor, sin: Tensor, rotated: int, *gradients: Tensor) -> Tensor:
    """`stretto.models.rope.apply_rotary_backward`, of three parts at most."""
    first = gradients[0]
    length, batch, _, dim = first.shape
    # Rows with positions of their own; or a head that is rotated in part, of which no model is large enough.
    if cos.shape[1] != 1 or cos.shape[-1] != dim:
        return formula.apply_rotary_backward(cos, sin, rotated, *gradients)
    heads = [part.shape[2] for part in gradients]
    out = torch.empty((length, batch, sum(heads), dim), dtype=first.dtype, device=first.device)
    blocks = triton.cdiv(sum(heads), _HEADS)
    # Parts that are not there have no heads.
    parts = [*gradients, first, first][:3]
    strides = [stride for part in parts for stride in part.stride()[:3]]
    sizes = [*heads, 0, 0][:3]
    _back[(length * batch * blocks,)](
        out, cos, sin, *parts, *sizes, sum(heads[:rotated]), blocks, batch, *strides, dim // 2, _HEADS, num_warps=4
    )
    return out
