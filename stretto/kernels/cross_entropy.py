"""Cross-entropy of long rows of logits: its statistics in one pass over them, its gradient in their place.

A compiler reads a row twice, for its highest logit and for the sum of exponentials below that, as no registers hold a
row of 150,000 words. Here each group of words that a thread reads at once has a highest and a sum of its own, which is
rescaled when a higher one comes (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018); groups
meet once, at the end of the row. A program has a row, however many rows there are: its bits depend on nothing else.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from stretto.kernels.launches import Launches, cdiv

_LONG: Final = (1024, 16)
"""Groups of 16 bytes that a program reads at a time for statistics, and its warps: two reads for each thread. Four
programs fill a multiprocessor: with 512 rows on an H200 they wait for 64 KiB, twice what memory delivers in the time
that it takes to answer."""
_SHORT: Final = (512, 8)
"""Of a gradient, where a program has nothing else."""
_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-(2.0**126))
"""What no logit lies below; 1.44 times that is a number, too."""


@triton.jit  # which reads annotations, and knows no types but its own
def _exp(x):
    """What is next to nothing is 0: three instructions less than by `tl.exp`, for each word."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _bent(x, cap):
    """tanh(x / cap) with an error of 1e-7, not of a share of it: what is capped is as large as the cap."""
    t = _exp(tl.abs(x) * (-2 / cap))
    return tl.where(x < 0, t - 1, 1 - t) / (1 + t)


@Launches
@triton.jit
def _statistics(
    logits,
    local,
    mine,
    top,
    exps,
    label,
    below,
    words,
    pitch,
    cap,
    turns: tl.constexpr,
    capped: tl.constexpr,
    smoothed: tl.constexpr,
    unit: tl.constexpr,
    groups: tl.constexpr,
    wide: tl.constexpr,
):
    row = tl.program_id(0)
    begin = logits + row.to(tl.int64) * pitch * unit
    first = tl.arange(0, groups)[:, None] * wide
    at = first + tl.arange(0, wide)[None, :]
    block: tl.constexpr = groups * wide
    minus = float("-inf")
    high = tl.full([groups], _LOWEST, tl.float32)
    total = tl.zeros([groups], tl.float32)
    seen, lower = total, total
    for turn in range(turns):
        inside = first + turn * block + wide <= words
        x = tl.load(begin + turn * block + at, mask=inside, other=minus).to(tl.float32)
        if capped:
            x = tl.where(inside, cap * _bent(x, cap), minus)
        new = tl.maximum(high, tl.max(x, 1))
        gap = high - new
        total = total * _exp(gap) + tl.sum(_exp(x - new[:, None]), 1)
        if smoothed:
            lower += seen * gap + tl.sum(tl.where(inside, x - new[:, None], 0.0), 1)
            seen += tl.sum(tl.where(inside, 1.0, 0.0), 1) * wide
        high = new
    # What of the words is no whole group.
    at = words // wide * wide + tl.arange(0, wide)
    x = tl.load(begin + at, mask=at < words, other=minus).to(tl.float32)
    if capped:
        x = tl.where(at < words, cap * _bent(x, cap), minus)
    highest = tl.maximum(tl.max(high, 0), tl.max(x, 0))
    gap = high - highest
    tl.store(top + row, highest)
    tl.store(exps + row, tl.sum(total * _exp(gap), 0) + tl.sum(_exp(x - highest), 0))
    if smoothed:
        tl.store(below + row, tl.sum(lower + seen * gap, 0) + tl.sum(tl.where(at < words, x - highest, 0.0), 0))
    of_label = tl.load(begin + tl.load(local + row)).to(tl.float32)
    if capped:
        of_label = cap * _bent(of_label, cap)
    tl.store(label + row, tl.where(tl.load(mine + row), of_label, 0.0))


@triton.jit
def _slope(logit, word, labelled, highest, scale, dy, cap, target, share, capped: tl.constexpr):
    x = logit.to(tl.float32)
    if capped:
        bent = _bent(x, cap)
        x, dy = cap * bent, dy * (1 - bent * bent)
    return ((_exp(x - highest) * scale - tl.where(word == labelled, target, share)) * dy).to(logit.dtype)


@Launches
@triton.jit
def _gradient(
    logits,
    local,
    mine,
    highest,
    exps,
    dy,
    rows,
    words,
    pitch,
    blocks,
    cap,
    target,
    share,
    z,
    capped: tl.constexpr,
    unit: tl.constexpr,
    groups: tl.constexpr,
    wide: tl.constexpr,
):
    # The ends of rows first: they were read last, and some of them are in the cache.
    row, block = tl.program_id(0) % rows, blocks - 1 - tl.program_id(0) // rows
    begin = logits + row.to(tl.int64) * pitch * unit
    first = (block * groups + tl.arange(0, groups)[:, None]) * wide
    at, inside = first + tl.arange(0, wide)[None, :], first + wide <= words
    x = tl.load(begin + at, mask=inside, other=float("-inf"))
    labelled = tl.where(tl.load(mine + row), tl.load(local + row).to(tl.int32), -1)
    top, total, d = tl.load(highest + row), tl.load(exps + row), tl.load(dy + row)
    scale = tl.div_rn(1 + 2 * z * (tl.log(total) + top), total)
    tl.store(begin + at, _slope(x, at, labelled, top, scale, d, cap, target, share, capped), mask=inside)
    if block == blocks - 1:  # what of the words is no whole group
        end = words // wide * wide + tl.arange(0, wide)
        rest = tl.load(begin + end, mask=end < words, other=float("-inf"))
        tl.store(begin + end, _slope(rest, end, labelled, top, scale, d, cap, target, share, capped), mask=end < words)


def statistics(
    logits: Tensor, local: Tensor, mine: Tensor, *, cap: float | None = None, smoothing: float = 0.0
) -> tuple[Tensor, ...]:
    """`stretto.tensor_parallel.loss_formulas.statistics` of some words. Raises RuntimeError for logits whose rows do
    not lie at equal distances."""
    shape, words = logits.shape[:-1], logits.shape[-1]
    found = torch.empty((4 if smoothing else 3, *shape), dtype=torch.float32, device=logits.device).unbind()
    rows, stride, unit, wide = _rows(logits)
    turns = cdiv(words // wide, _LONG[0])
    sizes = (words, stride, cap or 1.0, turns, cap is not None, bool(smoothing), unit, _LONG[0], wide)
    outs = (*found[:3], found[-1])
    _statistics[(rows,)](logits, local.contiguous(), mine.contiguous(), *outs, *sizes, num_warps=_LONG[1])
    return found


def gradient_(
    logits: Tensor,
    local: Tensor,
    mine: Tensor,
    highest: Tensor,
    exps: Tensor,
    dy: Tensor,
    *,
    cap: float | None = None,
    smoothing: float = 0.0,
    z: float = 0.0,
    vocab: int = 0,
) -> None:
    """`stretto.tensor_parallel.loss_formulas.gradient_` of some words, in their place. Raises as `statistics`."""
    words = logits.shape[-1]
    rows, stride, unit, wide = _rows(logits)
    blocks = cdiv(words, _SHORT[0] * wide)
    share = smoothing / vocab if smoothing else 0.0
    numbers = (cap or 1.0, 1 - smoothing + share, share, z)
    given = [x.contiguous() for x in (local, mine, highest, exps, dy)]
    sizes = (rows, words, stride, blocks, *numbers, cap is not None, unit, _SHORT[0], wide)
    _gradient[(rows * blocks,)](logits, *given, *sizes, num_warps=_SHORT[1])


def _rows(logits: Tensor) -> tuple[int, int, int, int]:
    """Number of rows; from one to the next, so many units of so many words; words in 16 bytes.

    Triton sees that all rows are aligned from a stride in units of 8 words.
    """
    flat = logits.view(-1, logits.shape[-1])
    unit = 8 if flat.stride(0) % 8 == 0 or len(flat) == 1 else 1  # of one row the stride says nothing
    return flat.shape[0], flat.stride(0) // unit, unit, 16 // logits.element_size()
