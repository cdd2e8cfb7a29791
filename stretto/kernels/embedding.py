"""The adjoint of looking rows up: each row of the gradient is read once, and only rows that were looked up are written.

Torch makes a gradient of the whole table in fp32 and adds that to what is there: the table is moved five times,
whatever was looked up. Here tokens are sorted by their row, and the programs of the first token of a row add those of
all. The sort is stable and the order of a sum follows from it: the same tokens give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stretto.kernels.launches import Launches, cdiv

_BLOCK = 512
"""Columns of a program."""
_TOKENS = 8
"""Of one row, which are read at a time: a word that is in every second sentence has hundreds."""


@Launches
@triton.jit  # which reads annotations, and knows no types but its own
def _add(total, dy, keys, order, tokens, rows, width, blocks, several: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(0) // blocks
    key = tl.load(keys + at)
    before = tl.load(keys + at - 1, mask=at > 0, other=-1)
    if (key < rows) & (key != before):
        column = tl.program_id(0) % blocks * block + tl.arange(0, block)
        within = column < width
        added = tl.zeros([block], tl.float32)
        going = 1
        while going > 0:
            each = at + tl.arange(0, several)
            same = tl.load(keys + each, mask=each < tokens, other=-1) == key
            token = tl.load(order + each, mask=same, other=0)
            place = token[:, None] * width + column[None, :]
            part = tl.load(dy + place, mask=same[:, None] & within[None, :], other=0.0).to(tl.float32)
            added += tl.sum(part, 0)
            going = tl.min(same.to(tl.int32), 0)
            at += several
        into = total + key * width + column
        tl.store(into, tl.load(into, mask=within, other=0.0) + added, mask=within)


def add_rows_(total: Tensor, dy: Tensor, ids: Tensor, mine: Tensor) -> Tensor:
    """`stretto.tensor_parallel.formulas.add_rows_`."""
    rows, width = total.shape
    keys, order = torch.sort(torch.where(mine, ids, rows).flatten(), stable=True)
    if tokens := len(keys):
        blocks = cdiv(width, _BLOCK)
        grid = (tokens * blocks,)
        _add[grid](total, dy.contiguous(), keys, order, tokens, rows, width, blocks, _TOKENS, _BLOCK, num_warps=4)
        torch.autograd.graph.increment_version(total)
    return total
