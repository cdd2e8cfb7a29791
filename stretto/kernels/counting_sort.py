"""Assignments by expert in two kernels, of which each program has a block of assignments.

Experts are few, so nothing is compared: the first kernel counts how often each expert is in each block, the second adds
up what lies before a block and puts its assignments behind one another. A radix sort and what made places and counts of
it were sixteen launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stretto.kernels.launches import Launches, cdiv, next_power_of_2

_BLOCK = 512
"""Assignments of a program."""
_HITS = 4096
"""Of a pass: so many assignments times so many experts."""


@triton.jit  # which reads annotations, and knows no types but its own
def _hits(keys, at, assignments, expert, rows: tl.constexpr):
    """[rows, experts]: 1 where an assignment is of an expert."""
    place = at + tl.arange(0, rows)
    key = tl.load(keys + place, mask=place < assignments, other=-1)
    return (key[:, None] == expert[None, :]).to(tl.int32)


@Launches
@triton.jit
def _count(keys, of_blocks, assignments, rows: tl.constexpr, wide: tl.constexpr, block: tl.constexpr):
    begin, expert = tl.program_id(0) * block, tl.arange(0, wide)
    found = tl.zeros([wide], tl.int32)
    for at in range(begin, begin + block, rows):
        found += tl.sum(_hits(keys, at, assignments, expert, rows), 0)
    tl.store(of_blocks + tl.program_id(0) * wide + expert, found)


@Launches
@triton.jit
def _place(
    keys,
    of_blocks,
    order,
    places,
    totals,
    ends,
    assignments,
    blocks,
    number,
    rows: tl.constexpr,
    wide: tl.constexpr,
    block: tl.constexpr,
):
    mine, expert = tl.program_id(0), tl.arange(0, wide)
    every, base = tl.zeros([wide], tl.int32), tl.zeros([wide], tl.int32)
    for first in range(0, blocks, rows):
        of = first + tl.arange(0, rows)
        held = tl.load(of_blocks + of[:, None] * wide + expert[None, :], mask=of[:, None] < blocks, other=0)
        every += tl.sum(held, 0)
        base += tl.sum(tl.where(of[:, None] < mine, held, 0), 0)
    end = tl.cumsum(every, 0)
    if mine == 0:
        tl.store(totals + expert, every.to(tl.int64), mask=expert < number)
        tl.store(ends + expert, end, mask=expert < number)
    base += end - every
    for at in range(mine * block, (mine + 1) * block, rows):
        hits, place = _hits(keys, at, assignments, expert, rows), at + tl.arange(0, rows)
        there = tl.sum(hits * (tl.cumsum(hits, 0) - 1 + base[None, :]), 1).to(tl.int64)
        tl.store(places + place, there, mask=place < assignments)
        tl.store(order + there, place.to(tl.int64), mask=place < assignments)
        base += tl.sum(hits, 0)


def sort_assignments(keys: Tensor, number: int, dropped: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`stretto.experts.rows.sort_assignments`."""
    keys, (assignments,), device = keys.contiguous(), keys.shape, keys.device
    order, places = torch.empty((2, assignments), dtype=torch.int64, device=device)
    wide = next_power_of_2(number + dropped)
    blocks, rows = cdiv(max(1, assignments), _BLOCK), min(max(1, _HITS // wide), _BLOCK)
    of_blocks = torch.empty((blocks, wide), dtype=torch.int32, device=device)
    totals = torch.empty(number, dtype=torch.int64, device=device)
    ends = torch.empty(number, dtype=torch.int32, device=device)
    _count[(blocks,)](keys, of_blocks, assignments, rows, wide, _BLOCK, num_warps=4)
    sizes = (assignments, blocks, number, rows, wide, _BLOCK)
    _place[(blocks,)](keys, of_blocks, order, places, totals, ends, *sizes, num_warps=4)
    return order, places, totals, ends
