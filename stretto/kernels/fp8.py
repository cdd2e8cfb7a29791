"""Scales and 8-bit copies of matrices.

A compiler writes the transposed copy a byte at a time, or reads all once more for it; here a tile is transposed on its
way through the multiprocessor, so that both copies are written in whole lines. A row that has a scale of its own is
held while its largest number is looked for, and read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stretto.kernels.launches import Launches, cdiv, next_power_of_2
from stretto.tensor_parallel.fp8 import E4M3, EXPONENT, LEAST, PAST_1_75, power

_EXPONENT, _PAST_1_75, _LEAST = tl.constexpr(EXPONENT), tl.constexpr(PAST_1_75), tl.constexpr(LEAST)

_BLOCK, _TURNS = 4096, 8
"""Elements that a program looks for the largest in: so many at a time, so often."""

TILE = (64, 128)
"""Rows and columns that are transposed at once: with four warps 16 bytes of fp8 for a thread, either way."""


@Launches
@triton.jit  # which reads annotations, and knows no types but its own
def _largest(x, shares, size, block: tl.constexpr, turns: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * block * turns
    most = tl.zeros([block], tl.float32)
    for turn in range(turns):
        at = start + turn * block + tl.arange(0, block)
        most = tl.maximum(most, tl.abs(tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)))
    tl.store(shares + tl.program_id(0), tl.max(most, 0))


@triton.jit
def _unit(most, power: tl.constexpr):
    bits = (tl.maximum(most, _LEAST).to(tl.int32, bitcast=True) + _PAST_1_75) & _EXPONENT
    return tl.where(most < float("inf"), (bits - (power << 23)).to(tl.float32, bitcast=True), most)


@Launches
@triton.jit
def _meaning(shares, scale, count, power: tl.constexpr, block: tl.constexpr):
    at = tl.arange(0, block)
    most = tl.max(tl.load(shares + at, mask=at < count, other=0.0), 0)
    tl.store(scale, _unit(most, power))


@triton.jit
def _quantize(
    x,
    scale,
    plain,
    flipped,
    rows,
    width,
    stride,
    with_plain: tl.constexpr,
    with_flipped: tl.constexpr,
    tall: tl.constexpr,
    wide: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * tall + tl.arange(0, tall)
    column = tl.program_id(1).to(tl.int64) * wide + tl.arange(0, wide)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    number = tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    small = (number * tl.div_rn(1.0, tl.load(scale))).to(plain.dtype.element_ty)
    if with_plain:
        tl.store(plain + row[:, None] * width + column[None, :], small, mask=inside)
    if with_flipped:
        across = (column[:, None] < width) & (row[None, :] < rows)
        tl.store(flipped + column[:, None] * rows + row[None, :], tl.trans(small), mask=across)


@Launches
@triton.jit
def _quantize_row(x, scale, out, width, stride, power: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    number = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    unit = _unit(tl.max(tl.abs(number), 0), power)
    tl.store(scale + row, unit)
    tl.store(out + row * width + column, (number * tl.div_rn(1.0, unit)).to(out.dtype.element_ty), mask=inside)


@Launches
@triton.jit
def _quantize_flat(x, scale, into, size, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    number = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(into + at, (number * tl.div_rn(1.0, tl.load(scale))).to(into.dtype.element_ty), mask=at < size)


@triton.jit
def _transpose(small, transposed, rows, width, tall: tl.constexpr, wide: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * tall + tl.arange(0, tall)
    column = tl.program_id(1).to(tl.int64) * wide + tl.arange(0, wide)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    byte = tl.load(small + row[:, None] * width + column[None, :], mask=inside, other=0)
    across = (column[:, None] < width) & (row[None, :] < rows)
    tl.store(transposed + column[:, None] * rows + row[None, :], tl.trans(byte), mask=across)


@Launches
@triton.jit
def _add(total, part, size, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < size
    sum_ = tl.load(total + at, mask=inside) + tl.load(part + at, mask=inside).to(tl.float32)
    tl.store(total + at, sum_, mask=inside)


def add_(total: Tensor, part: Tensor) -> None:
    """`stretto.tensor_parallel.fp8.add_`, of contiguous tensors: torch moves mixed dtypes an element at a time."""
    size = total.numel()
    _add[(cdiv(size, _BLOCK),)](total, part, size, _BLOCK, num_warps=8)


def scale(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """`stretto.tensor_parallel.fp8.scale`: [n, d] -> [1, 1]."""
    x = x.contiguous()
    programs = cdiv(x.numel(), _BLOCK * _TURNS)
    shares = torch.empty(programs, dtype=torch.float32, device=x.device)
    out = torch.empty(1, 1, dtype=torch.float32, device=x.device)
    _largest[(programs,)](x, shares, x.numel(), _BLOCK, _TURNS, num_warps=8)
    block = next_power_of_2(programs)
    _meaning[(1,)](shares, out, programs, power(dtype), block, num_warps=4)
    return out


def quantize(x: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """`stretto.tensor_parallel.fp8.quantize`, by one scale: [n, d] -> [n, d]."""
    return copies(x, scale, dtype, transposed=False)[0]


def quantize_transposed(x: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """`stretto.tensor_parallel.fp8.quantize_transposed`, by one scale: [n, d] -> [d, n]."""
    return copies(x, scale, dtype, plain=False)[1]


def quantize_both(x: Tensor, scale: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`stretto.tensor_parallel.fp8.quantize_both`, by one scale: [n, d] -> [n, d] and [d, n]."""
    return copies(x, scale, dtype)


def quantize_(out: Tensor, x: Tensor, scale: Tensor) -> None:
    """`stretto.tensor_parallel.fp8_shards.quantize_`: [n], in the place of `out`."""
    _quantize_flat[(cdiv(x.numel(), _BLOCK),)](x, scale, out, x.numel(), _BLOCK, num_warps=8)


def transpose_(out: Tensor, x: Tensor) -> None:
    """`stretto.tensor_parallel.fp8_shards.transpose_`, of contiguous bytes: [n, d] to [d, n], in the place of `out`."""
    rows, width = x.shape
    grid = (cdiv(rows, TILE[0]), cdiv(width, TILE[1]))
    _transpose[grid](x, out, rows, width, *TILE, num_warps=4)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`stretto.tensor_parallel.fp8.quantize_rows`: [n, d] -> [n, d], and scales [n, 1]."""
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=E4M3, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = next_power_of_2(width)
    warps = min(16, max(4, block // 1024))
    _quantize_row[(rows,)](x, scale, out, width, x.stride(0), power(E4M3), block, num_warps=warps)
    return out, scale


def copies(
    x: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    *,
    plain: bool = True,
    transposed: bool = True,
    tile: tuple[int, int] = TILE,
    warps: int = 4,
) -> tuple[Tensor, Tensor]:
    """x [n, d] in units of its scale as [n, d] and as [d, n]; of what is not asked for, something empty."""
    rows, width = x.shape
    as_it_lies = torch.empty((rows, width) if plain else (0,), dtype=dtype, device=x.device)
    across = torch.empty((width, rows) if transposed else (0,), dtype=dtype, device=x.device)
    grid = (cdiv(rows, tile[0]), cdiv(width, tile[1]))
    _quantize[grid](x, scale, as_it_lies, across, rows, width, x.stride(0), plain, transposed, *tile, num_warps=warps)
    return as_it_lies, across
