"""Triton kernels that `benchmarks.fp8` holds against what `torch.compile` makes of the same passes.

amax     one pass: the largest size of a matrix
narrow   one pass: x / scale in fp8, as it lies, transposed, or both; one read for two copies
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # which reads annotations, and knows no types but its own
def _narrow(
    x,
    scale,
    plain,
    turned,
    rows,
    cols,
    PLAIN: tl.constexpr,  # noqa: N803
    TURNED: tl.constexpr,  # noqa: N803
    TALL: tl.constexpr,  # noqa: N803
    WIDE: tl.constexpr,  # noqa: N803
):
    """One tile of x [rows, cols]; the transposed copy is turned in registers, so that both writes are whole lines."""
    r = tl.program_id(0).to(tl.int64) * TALL + tl.arange(0, TALL)
    c = tl.program_id(1).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    inside = (r[:, None] < rows) & (c[None, :] < cols)
    wide = tl.load(x + r[:, None] * cols + c[None, :], mask=inside, other=0.0).to(tl.float32)
    small = (wide * (1 / tl.load(scale))).to(plain.dtype.element_ty)
    if PLAIN:
        tl.store(plain + r[:, None] * cols + c[None, :], small, mask=inside)
    if TURNED:
        across = (c[:, None] < cols) & (r[None, :] < rows)
        tl.store(turned + c[:, None] * rows + r[None, :], tl.trans(small), mask=across)


@triton.jit  # which reads annotations, and knows no types but its own
def _amax(x, out, size, BLOCK: tl.constexpr, TIMES: tl.constexpr):  # noqa: N803
    """Sizes of non-negative floats are in the order of their bits, so an integer maximum will do."""
    start = tl.program_id(0).to(tl.int64) * BLOCK * TIMES
    most = tl.zeros([BLOCK], tl.float32)
    for i in range(TIMES):
        at = start + i * BLOCK + tl.arange(0, BLOCK)
        most = tl.maximum(most, tl.abs(tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)))
    tl.atomic_max(out, tl.max(most, 0))


@triton.jit  # which reads annotations, and knows no types but its own
def _narrow_row(x, scale, out, width, LEAST: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """One row, held while its largest is looked for."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    wide = tl.load(x + row * width + at, mask=at < width, other=0.0).to(tl.float32)
    unit = tl.maximum(tl.max(tl.abs(wide), 0), LEAST) / MOST
    tl.store(scale + row, unit)
    tl.store(out + row * width + at, (wide * (1 / unit)).to(out.dtype.element_ty), mask=at < width)


def narrow_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`stretto.tensor_parallel.fp8.narrow_rows`: x [n, d] -> [n, d] in e4m3, and scales [n, 1]."""
    rows, width = x.shape
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _narrow_row[(rows,)](x, scale, out, width, 1e-30, 448.0, block, num_warps=min(16, max(4, block // 1024)))
    return out, scale


def narrow(
    x: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    *,
    plain: bool,
    turned: bool,
    tile: tuple[int, int] = (64, 128),
    warps: int = 4,
) -> tuple[Tensor, Tensor]:
    """x [n, d] / scale [] as [n, d] and as [d, n]; of what is not asked for, something empty."""
    rows, cols = x.shape
    as_it_lies = x.new_empty((rows, cols) if plain else (0,), dtype=dtype)
    across = x.new_empty((cols, rows) if turned else (0,), dtype=dtype)
    grid = (triton.cdiv(rows, tile[0]), triton.cdiv(cols, tile[1]))
    _narrow[grid](x, scale, as_it_lies, across, rows, cols, plain, turned, *tile, num_warps=warps)
    return as_it_lies, across


def amax(x: Tensor, *, block: int = 4096, times: int = 8) -> Tensor:
    """The largest size in x, [] in fp32."""
    out = torch.zeros((), dtype=torch.float32, device=x.device)
    _amax[(triton.cdiv(x.numel(), block * times),)](x, out, x.numel(), block, times)
    return out
