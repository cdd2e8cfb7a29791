"""Heads turned in place, and gradients turned back as they are put side by side.

A compiler that puts three tensors side by side asks for every element of the result which of them it comes from, and
reads each of a turned head's halves twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stretto.kernels.head_tiles import halves, place, put, rotated, rotated_back, rows, wide
from stretto.kernels.launches import Launches, cdiv
from stretto.models import rope as formula

_HEADS = 16
"""Heads of a program: of 128 features, each thread of four warps has 16 bytes of either half."""

_ELEMENTS = 4096
"""Of a program that puts gradients side by side: four loads of 16 bytes of bf16 for each thread of four warps."""


@Launches
@triton.jit  # which reads annotations, and knows no types but its own
def _turn(x, cos, sin, heads, blocks, batch, stride_s, stride_b, stride_h, half: tl.constexpr, count: tl.constexpr):
    token = tl.program_id(0) // blocks
    s, b = (token // batch).to(tl.int64), (token % batch).to(tl.int64)
    head = tl.program_id(0) % blocks * count + tl.arange(0, count)
    pair = tl.arange(0, half)
    c = tl.load(cos + s * 2 * half + pair).to(tl.float32)[None, :]
    z = tl.load(sin + s * 2 * half + pair).to(tl.float32)[None, :]
    at = x + s * stride_s + b * stride_b + head[:, None] * stride_h
    inside = (head < heads)[:, None]
    put(at, rotated(wide(halves(at, inside, half)), c, z), inside, half)


@triton.jit
def _part(
    out, x, steps, cos, sin, tile, tokens, heads, all_heads, first, rotate, batch,
    half: tl.constexpr, tall: tl.constexpr,
):  # fmt: skip
    """Some heads of one part of all, rotated back where the part was rotated."""
    inside, token, at = place(tile, tokens, batch, heads, tall)
    angle = at[0] * 2 * half + tl.arange(0, half)[None, :]
    c = tl.load(cos + angle, mask=inside & (rotate > 0), other=1.0).to(tl.float32)
    z = tl.load(sin + angle, mask=inside & (rotate > 0), other=0.0).to(tl.float32)
    back = rotated_back(wide(halves(rows(x, at, steps), inside, half)), c, z)
    put(out + (token * all_heads + first + at[2]) * 2 * half, back, inside, half)


@Launches
@triton.jit
def _back(
    out, cos, sin, one, two, three, tokens, heads_one, heads_two, heads_three, rotate, batch,
    one_s, one_b, one_h, two_s, two_b, two_h, three_s, three_b, three_h, half: tl.constexpr, count: tl.constexpr,
):  # fmt: skip
    """A program has some heads of one part: whose, follows from its number."""
    tiles_one, tiles_two = tl.cdiv(tokens * heads_one, count), tl.cdiv(tokens * heads_two, count)
    tile, heads = tl.program_id(0), heads_one + heads_two + heads_three
    if tile < tiles_one:
        _part(
            out, one, (one_s, one_b, one_h), cos, sin, tile, tokens, heads_one, heads, 0, rotate, batch, half, count
        )  # fmt: skip
    elif tile < tiles_one + tiles_two:
        _part(
            out, two, (two_s, two_b, two_h), cos, sin, tile - tiles_one, tokens, heads_two, heads, heads_one,
            rotate - 1, batch, half, count,
        )  # fmt: skip
    else:
        _part(
            out, three, (three_s, three_b, three_h), cos, sin, tile - tiles_one - tiles_two, tokens, heads_three, heads,
            heads_one + heads_two, rotate - 2, batch, half, count,
        )  # fmt: skip


def apply_rotary_(x: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> None:
    """`stretto.models.rope.apply_rotary_`."""
    length, batch = x.shape[:2]
    if cos.shape[1] != 1:  # rows of several documents, whose tokens have positions of their own
        formula.apply_rotary_(x, cos, sin, rotated)
        return
    blocks = cdiv(rotated, _HEADS)
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
    heads, tokens = [part.shape[2] for part in gradients], length * batch
    out = torch.empty((length, batch, sum(heads), dim), dtype=first.dtype, device=first.device)
    # Parts that are not there have no heads.
    parts = [*gradients, first, first][:3]
    strides = [stride for part in parts for stride in part.stride()[:3]]
    count = max(_ELEMENTS // dim, 1)
    programs = sum(cdiv(tokens * each, count) for each in heads)
    if programs:
        sizes = (tokens, *[*heads, 0, 0][:3], rotated, batch, *strides, dim // 2, count)
        _back[(programs,)](out, cos, sin, *parts, *sizes, num_warps=4)
    return out
