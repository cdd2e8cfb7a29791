"""The adjoint of RMSNorm with the gradient of its weight, and with the gradient of what goes past it.

The gradient of the weight is a sum over rows, that of the input needs sums over columns: a compiler reads all once for
the one and once for the other. Here a program goes through some of the rows and keeps its share of the former sum in
registers; the shares are added up in the end, always in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 8
"""For each multiprocessor: enough rows under way that memory is never idle."""


@triton.jit  # which reads annotations, and knows no types but its own
def _kernel(
    dy,
    x,
    weight,
    past,
    dx,
    y,
    shares,
    rows,
    width,
    eps,
    with_past: tl.constexpr,
    again: tl.constexpr,
    turns: tl.constexpr,
    block: tl.constexpr,
):
    column = tl.arange(0, block)
    within = column < width
    w = tl.load(weight + column, mask=within, other=0.0).to(tl.float32)
    share = tl.zeros([block], tl.float32)
    for turn in range(turns):
        row = tl.program_id(0) + turn * tl.num_programs(0)
        inside = within & (row < rows)
        at = row.to(tl.int64) * width + column
        wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        dn = d * w
        scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
        n = wide * scale
        out = (dn - n * (tl.sum(dn * n, 0) / width)) * scale
        if with_past:
            out += tl.load(past + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=inside)
        if again:
            tl.store(y + at, (n * w).to(y.dtype.element_ty), mask=inside)
        share += d * n
    tl.store(shares + tl.program_id(0) * width + column, share, mask=within)


def backward(dy: Tensor, x: Tensor, weight: Tensor, *, eps: float, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`stretto.tensor_parallel.formulas.rms_norm_backward`: dy, x, past [.., h], weight [h], contiguous."""
    _, dx, dw = _launch(dy, x, weight, past, eps, again=False)
    return dx, dw


def both(
    dy: Tensor, x: Tensor, weight: Tensor, *, eps: float, past: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`stretto.tensor_parallel.formulas.rms_norm_both`: the output once more, and the gradients."""
    return _launch(dy, x, weight, past, eps, again=True)


def _launch(
    dy: Tensor, x: Tensor, weight: Tensor, past: Tensor | None, eps: float, *, again: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dy, x, past, width = dy.contiguous(), x.contiguous(), past if past is None else past.contiguous(), x.shape[-1]
    rows = x.numel() // width
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    programs = min(rows, _PROGRAMS * processors)
    turns = triton.cdiv(rows, programs)
    block = triton.next_power_of_2(width)
    warps = min(max(block // 256, 1), 16)
    dx = torch.empty_like(x)
    y = torch.empty_like(x) if again else x
    shares = torch.empty((programs, width), dtype=torch.float32, device=x.device)
    given = x if past is None else past
    _kernel[(programs,)](
        dy, x, weight, given, dx, y, shares, rows, width, eps, past is not None, again, turns, block, num_warps=warps
    )
    return y, dx, shares.sum(0).to(weight.dtype)
