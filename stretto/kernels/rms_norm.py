"""The adjoint of RMSNorm with the gradient of its weight, and with the gradient of what goes past it.

The gradient of the weight is a sum over rows, that of the input needs sums over columns: a compiler reads all once for
the one and once for the other. Here a program goes through some of the rows and keeps its share of the former sum in
registers; the shares are added up in the end, always in the same order. Rows that are narrow, as those of a head's
norm, are taken several at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stretto.kernels.launches import Launches, cdiv, next_power_of_2

_PROGRAMS = 3
"""For each multiprocessor, two tiles in flight in each. Measured on an H200 with widths of 2048 and 4096: two to eight
lie within 15 %, one is half as fast."""

_TILE = 2048
"""Numbers that a program takes at a time at least: of one row, or of several that are narrow."""

_TALL, _WIDE = 64, 32
"""Of the shares, what a program adds up at a time: rows, and the columns that are its own."""


@Launches
@triton.jit  # which reads annotations, and knows no types but its own
def _kernel(
    dy,
    x,
    weight,
    dresidual,
    dx,
    y,
    shares,
    rows,
    width,
    eps,
    centre,
    with_dresidual: tl.constexpr,
    recompute: tl.constexpr,
    turns: tl.constexpr,
    tall: tl.constexpr,
    block: tl.constexpr,
):
    column = tl.arange(0, block)[None, :]
    within = column < width
    w = tl.load(weight + column, mask=within, other=0.0).to(tl.float32) + centre
    share = tl.zeros([tall, block], tl.float32)
    row = tl.program_id(0) * tall + tl.arange(0, tall)[:, None]
    inside = within & (row < rows)
    at = row.to(tl.int64) * width + column
    x_ahead = tl.load(x + at, mask=inside, other=0.0)
    d_ahead = tl.load(dy + at, mask=inside, other=0.0)
    p_ahead = tl.load(dresidual + at, mask=inside, other=0.0) if with_dresidual else x_ahead
    for _ in range(turns):
        here, here_inside = at, inside
        wide, d, p = x_ahead.to(tl.float32), d_ahead.to(tl.float32), p_ahead
        # The next rows are in flight while these are summed up.
        row += tl.num_programs(0) * tall
        inside = within & (row < rows)
        at = row.to(tl.int64) * width + column
        x_ahead = tl.load(x + at, mask=inside, other=0.0)
        d_ahead = tl.load(dy + at, mask=inside, other=0.0)
        p_ahead = tl.load(dresidual + at, mask=inside, other=0.0) if with_dresidual else x_ahead
        dn = d * w
        squares, products = tl.sum(wide * wide, 1, keep_dims=True), tl.sum(dn * wide, 1, keep_dims=True)
        scale = tl.rsqrt(squares / width + eps)
        n = wide * scale
        out = (dn - n * (products * scale / width)) * scale
        if with_dresidual:
            out += p.to(tl.float32)
        tl.store(dx + here, out.to(dx.dtype.element_ty), mask=here_inside)
        if recompute:
            tl.store(y + here, (n * w).to(y.dtype.element_ty), mask=here_inside)
        share += d * n
    added = tl.sum(share, 0)
    column = tl.arange(0, block)
    tl.store(shares + tl.program_id(0) * width + column, added, mask=column < width)


@Launches
@triton.jit
def _add_up(shares, out, programs, width, turns: tl.constexpr, tall: tl.constexpr, wide: tl.constexpr):
    """out [width] = the sum over the rows of shares [programs, width]."""
    column = tl.program_id(0) * wide + tl.arange(0, wide)
    within = (column < width)[None, :]
    total = tl.zeros([tall, wide], tl.float32)
    for turn in range(turns):
        row = turn * tall + tl.arange(0, tall)
        at = row[:, None] * width + column[None, :]
        total += tl.load(shares + at, mask=within & (row < programs)[:, None], other=0.0)
    tl.store(out + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < width)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, *, eps: float, dresidual: Tensor | None = None, centre: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`stretto.tensor_parallel.formulas.rms_norm_backward`: dy, x, past [.., h], weight [h], contiguous.

    With `centre` 1 it is that of the norm that multiplies by 1 + weight.
    """
    _, dx, dw = _launch(dy, x, weight, dresidual, eps, centre, recompute=False)
    return dx, dw


def both(
    dy: Tensor, x: Tensor, weight: Tensor, *, eps: float, dresidual: Tensor | None = None, centre: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """`stretto.tensor_parallel.formulas.rms_norm_both`: the output once more, and the gradients."""
    return _launch(dy, x, weight, dresidual, eps, centre, recompute=True)


def _launch(
    dy: Tensor, x: Tensor, weight: Tensor, dresidual: Tensor | None, eps: float, centre: float, *, recompute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dy, x, width = dy.contiguous(), x.contiguous(), x.shape[-1]
    given = x if dresidual is None else dresidual.contiguous()
    rows = x.numel() // width
    processors = _kernel.processors(x.device)
    block = next_power_of_2(width)
    tall = max(_TILE // block, 1)
    programs = min(cdiv(rows, tall), _PROGRAMS * processors)
    turns = cdiv(rows, tall * programs)
    dx = torch.empty_like(x)
    y = torch.empty_like(x) if recompute else x
    shares = torch.empty((programs, width), dtype=torch.float32, device=x.device)
    sizes = (rows, width, eps, centre, dresidual is not None, recompute, turns, tall, block)
    warps = min(max(tall * block // 512, 1), 16)
    _kernel[(programs,)](dy, x, weight, given, dx, y, shares, *sizes, num_warps=warps)
    dw = torch.empty_like(weight)
    add_up(shares, dw)
    return y, dx, dw


def add_up(shares: Tensor, out: Tensor) -> None:
    """out [width] = the sum of shares [programs, width], always in the same order."""
    programs, width = shares.shape
    turns = cdiv(programs, _TALL)
    _add_up[(cdiv(width, _WIDE),)](shares, out, programs, width, turns, _TALL, _WIDE, num_warps=4)
