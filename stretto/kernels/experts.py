"""Rows of experts to and from their tokens: every row is read and written once.

A program has one token, which it reads or writes once, and goes through the places of its rows. By plain operations
each slot is a gather, a product and a sum in fp32, each of them a pass over memory. Slots are added in their order, so
the bits of a sum depend on nothing but its terms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stretto.kernels.launches import Launches, cdiv, next_power_of_2

_BLOCK = 2048
"""Columns of a program: with four warps two loads of 16 bytes of bf16 for a thread and row."""


@Launches
@triton.jit  # which reads annotations, and knows no types but its own
def _add_up(
    y,
    more,
    weights,
    back,
    beside,
    out,
    tokens,
    own,
    sent,
    width,
    blocks,
    two: tl.constexpr,
    weighted: tl.constexpr,
    added: tl.constexpr,
    slots: tl.constexpr,
    parts: tl.constexpr,
    block: tl.constexpr,
):
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * block + tl.arange(0, block)
    within = column < width
    total = tl.zeros([block], tl.float32)
    for k in tl.static_range(slots):
        slot = tl.zeros([block], tl.float32)
        for part in tl.static_range(parts):
            place = tl.load(back + (part * tokens + token) * slots + k)
            here = within & (place < sent)
            row = y + place * width
            if two:
                row = tl.where(place < own, row, more + (place - own) * width)
            slot += tl.load(row + column, mask=here, other=0.0).to(tl.float32)
        if weighted:
            slot *= tl.load(weights + token * slots + k).to(tl.float32)
        total += slot
    if added:
        total = total.to(out.dtype.element_ty).to(tl.float32)
        total += tl.load(beside + token * width + column, mask=within, other=0.0).to(tl.float32)
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=within)


@Launches
@triton.jit
def _scatter(x, back, out, tokens, sent, width, blocks, slots: tl.constexpr, parts: tl.constexpr, block: tl.constexpr):
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * block + tl.arange(0, block)
    within = column < width
    row = tl.load(x + token * width + column, mask=within, other=0.0)
    for part in tl.static_range(parts):
        for k in tl.static_range(slots):
            place = tl.load(back + (part * tokens + token) * slots + k)
            tl.store(out + place * width + column, row, mask=within & (place < sent))


@Launches
@triton.jit
def _by_expert(counts, order, inverse, sources, experts, most: tl.constexpr, block: tl.constexpr):
    """A program has the rows of one expert that come from one source."""
    mine = tl.program_id(0)
    source, expert = mine // experts, mine % experts
    each = tl.arange(0, most)
    held = tl.load(counts + each, mask=each < sources * experts, other=0)
    sooner = (each % experts < expert) | ((each % experts == expert) & (each // experts < source))
    begin, place = tl.sum(tl.where(each < mine, held, 0), 0), tl.sum(tl.where(sooner, held, 0), 0)
    number = tl.load(counts + mine).to(tl.int32)
    for at in range(0, number, block):
        row = at + tl.arange(0, block)
        tl.store(order + place + row, begin + row, mask=row < number)
        tl.store(inverse + begin + row, place + row, mask=row < number)


def by_expert(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """`stretto.experts.rows.by_expert`."""
    counts = counts.contiguous()
    order, inverse = torch.empty((2, total), dtype=torch.int64, device=counts.device)
    most = next_power_of_2(counts.numel())
    _by_expert[(counts.numel(),)](counts, order, inverse, *counts.shape, most, 1024, num_warps=4)
    return order, inverse


def scatter_rows(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """`stretto.experts.rows.scatter_rows`."""
    x, back, (parts, tokens, slots) = x.contiguous(), back.contiguous(), back.shape
    rows = torch.empty((len(order), x.shape[1]), dtype=x.dtype, device=x.device)
    block, blocks = _blocks(x.shape[1])
    if tokens and len(order):
        grid = (tokens * blocks,)
        _scatter[grid](x, back, rows, tokens, *rows.shape, blocks, slots, parts, block, num_warps=_warps(block))
    return rows


def sum_rows(rows: Tensor, more: Tensor | None, back: Tensor, beside: Tensor | None = None) -> Tensor:
    """`stretto.experts.rows.sum_rows`."""
    return _added(rows, more, back, None, beside)


def combine_rows(rows: Tensor, more: Tensor | None, weights: Tensor, back: Tensor) -> Tensor:
    """`stretto.experts.rows.combine_rows`."""
    return _added(rows, more, back, weights, None)


def _added(rows: Tensor, more: Tensor | None, back: Tensor, weights: Tensor | None, beside: Tensor | None) -> Tensor:
    rows, back, (parts, tokens, slots) = rows.contiguous(), back.contiguous(), back.shape
    out = torch.empty((tokens, rows.shape[1]), dtype=rows.dtype, device=rows.device)
    block, blocks = _blocks(rows.shape[1])
    others = [rows if x is None else x.contiguous() for x in (more, weights, beside)]
    sent = len(rows) if more is None else len(rows) + len(more)
    sizes = (tokens, len(rows), sent, rows.shape[1], blocks)
    kind = (more is not None, weights is not None, beside is not None, slots, parts, block)
    if tokens:
        _add_up[(tokens * blocks,)](rows, *others[:2], back, others[2], out, *sizes, *kind, num_warps=_warps(block))
    return out


def _blocks(width: int) -> tuple[int, int]:
    """Columns of a program, and programs for a row."""
    block = min(next_power_of_2(width), _BLOCK)
    return block, cdiv(width, block)


def _warps(elements: int) -> int:
    """Of a program: 16 elements of a row for a thread."""
    return min(max(elements // 512, 1), 8)
