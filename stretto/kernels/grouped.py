"""Weight gradients of all experts in one kernel: a GEMM for each expert keeps a host longer than a GPU.

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
def _with_rows(
    found,
    left_rows,
    right_rows,
    left,
    right,
    begin,
    end,
    height,
    width,
    top,
    first,
    tall: tl.constexpr,
    wide: tl.constexpr,
    deep: tl.constexpr,
):
    """found [tall, wide] and the GEMM of the rows from begin to end."""
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
    return found


@triton.jit
def _products(
    left_rows,
    right_rows,
    left,
    right,
    ends,
    more_left_rows,
    more_right_rows,
    more_left,
    more_right,
    more_ends,
    tiles_out,
    height,
    width,
    two: tl.constexpr,
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
    empty = begin == end
    if two:
        more_begin = tl.load(more_ends + expert - 1, mask=expert > 0, other=0)
        more_end = tl.load(more_ends + expert)
        empty = empty & (more_begin == more_end)
    if empty and add:
        return
    top, first = tile // across * tall, tile % across * wide
    found = tl.zeros([tall, wide], tl.float32)
    found = _with_rows(
        found, left_rows, right_rows, left, right, begin, end, height, width, top, first, tall, wide, deep
    )
    if two:
        found = _with_rows(
            found,
            more_left_rows,
            more_right_rows,
            more_left,
            more_right,
            more_begin,
            more_end,
            height,
            width,
            top,
            first,
            tall,
            wide,
            deep,
        )
    if add:
        tiles_out.atomic_add([expert * height + top, first], found)
    else:
        tiles_out.store([expert * height + top, first], found)


def add_products(
    total: Tensor,
    first_microbatch: bool,
    *factors: Any,
    tall: int = 128,
    wide: int = 256,
    deep: int = 32,
    warps: int = 8,
    stages: int = 6,
) -> None:
    """`stretto.experts.grouped.add_products` of widths that are multiples of 128, of one or two parts that have rows
    each."""
    experts, height, width = total.shape
    wide = min(wide, width & -width)  # the largest power of two that divides it
    out = TensorDescriptor.from_tensor(total.view(experts * height, width), [tall, wide])
    parts = []
    for dy, x, segments in zip(*[iter(factors)] * 3, strict=True):
        left, right = dy.contiguous(), x.contiguous()
        read = [TensorDescriptor.from_tensor(rows, [deep, n]) for rows, n in ((left, tall), (right, wide))]
        parts.append((*read, left, right, segments.ends))
    grid = (experts * (height // tall) * (width // wide),)
    sizes = (height, width, len(parts) > 1, not first_microbatch, tall, wide, deep)
    _products[grid](*parts[0], *parts[-1], out, *sizes, num_warps=warps, num_stages=stages)
