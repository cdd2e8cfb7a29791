"""Weight gradients of all experts in one kernel: a product for each expert has more launches than work.

A program makes one tile of one expert's gradient from that expert's rows alone, and finds on the device where they
begin and end, so the host needs no count. The sum over rows is in fp32, in their order.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # which reads annotations, and knows no types but its own
def _products(
    left,
    right,
    ends,
    total,
    height,
    width,
    add: tl.constexpr,
    tall: tl.constexpr,
    wide: tl.constexpr,
    deep: tl.constexpr,
):
    across = tl.cdiv(width, wide)
    tiles = tl.cdiv(height, tall) * across
    expert, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    if begin == end and add:
        return
    row = tile // across * tall + tl.arange(0, tall)
    column = tile % across * wide + tl.arange(0, wide)
    found = tl.zeros([tall, wide], tl.float32)
    for at in range(begin, end, deep):
        places = at + tl.arange(0, deep)
        held = (places < end)[:, None]
        places = places.to(tl.int64)[:, None]
        one = tl.load(left + places * height + row[None, :], mask=held & (row < height)[None, :], other=0.0)
        two = tl.load(right + places * width + column[None, :], mask=held & (column < width)[None, :], other=0.0)
        found = tl.dot(tl.trans(one), two, found)
    out = total + (expert.to(tl.int64) * height + row[:, None]) * width + column[None, :]
    inside = (row < height)[:, None] & (column < width)[None, :]
    if add:
        found += tl.load(out, mask=inside, other=0.0)
    tl.store(out, found, mask=inside)


def add_products(
    dy: Tensor,
    x: Tensor,
    total: Tensor,
    segments: Any,
    first_microbatch: bool,
    *,
    tall: int = 128,
    wide: int = 256,
    deep: int = 64,
    warps: int = 8,
    stages: int = 3,
) -> None:
    """`stretto.experts.grouped.add_products`."""
    dy, x, experts = dy.contiguous(), x.contiguous(), total.shape[0]
    (_, height), (_, width) = dy.shape, x.shape
    grid = (experts * triton.cdiv(height, tall) * triton.cdiv(width, wide),)
    sizes = (height, width, not first_microbatch, tall, wide, deep)
    _products[grid](dy, x, segments.ends, total, *sizes, num_warps=warps, num_stages=stages)
