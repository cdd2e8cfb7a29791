"""Weight gradients of all experts in one kernel: a product for each expert keeps a host longer than a GPU.

A program makes one tile of one expert's gradient from that expert's rows alone, and finds on the device where they
begin and end, so the host needs no count. The sum over rows is in fp32, in their order, and added to what is there by
the tensor copy engine: a program neither reads it nor waits until it is written.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit  # which reads annotations, and knows no types but its own
def _products(
    left_rows,
    right_rows,
    tiles_out,
    left,
    right,
    ends,
    height,
    width,
    add: tl.constexpr,
    tall: tl.constexpr,
    wide: tl.constexpr,
    deep: tl.constexpr,
):
    across = width // wide
    tiles = height // tall * across
    expert, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    if begin == end and add:
        return
    top, first = tile // across * tall, tile % across * wide
    found = tl.zeros([tall, wide], tl.float32)
    whole = begin + (end - begin) // deep * deep
    for at in range(begin, whole, deep):
        one, two = left_rows.load([at, top]), right_rows.load([at, first])
        found = tl.dot(tl.trans(one), two, found)
    if whole < end:  # the rest of the rows, and none of the next expert's
        row, column = top + tl.arange(0, tall), first + tl.arange(0, wide)
        places = whole + tl.arange(0, deep)
        held = (places < end)[:, None]
        places = places.to(tl.int64)[:, None]
        one = tl.load(left + places * height + row[None, :], mask=held, other=0.0)
        two = tl.load(right + places * width + column[None, :], mask=held, other=0.0)
        found = tl.dot(tl.trans(one), two, found)
    if add:
        tiles_out.atomic_add([expert * height + top, first], found)
    else:
        tiles_out.store([expert * height + top, first], found)


def add_products(
    dy: Tensor,
    x: Tensor,
    total: Tensor,
    segments: Any,
    first_microbatch: bool,
    *,
    tall: int = 128,
    wide: int = 256,
    deep: int = 32,
    warps: int = 8,
    stages: int = 6,
) -> None:
    """`stretto.experts.grouped.add_products` of widths that are multiples of 128, and of some rows."""
    dy, x, (experts, height, width) = dy.contiguous(), x.contiguous(), total.shape
    wide = min(wide, width & -width)  # the largest power of two that divides it
    blocks = ((dy, tall), (x, wide))
    factors = [TensorDescriptor.from_tensor(factor, [deep, columns]) for factor, columns in blocks]
    out = TensorDescriptor.from_tensor(total.view(experts * height, width), [tall, wide])
    grid = (experts * (height // tall) * (width // wide),)
    sizes = (height, width, not first_microbatch, tall, wide, deep)
    _products[grid](*factors, out, dy, x, segments.ends, *sizes, num_warps=warps, num_stages=stages)
