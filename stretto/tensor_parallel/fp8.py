"""Matrix products of numbers of 8 bits: 4 of exponent and 3 of mantissa (e4m3), or 5 and 2 (e5m2)."""

from __future__ import annotations

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

_LEAST = 1e-30  # what is smaller counts as zeros: its scale, and a product of two, must stay normal numbers in fp32


def amax(x: Tensor) -> Tensor:
    """The largest size in a tensor, [] in fp32."""
    return x.abs().amax().float()


def row_amax(x: Tensor) -> Tensor:
    """[n, d] -> [n, 1] in fp32."""
    return x.abs().amax(-1, keepdim=True).float()


def column_amax(x: Tensor) -> Tensor:
    """[n, d] -> [1, d] in fp32."""
    return x.abs().amax(0, keepdim=True).float()


def scale_of(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """What numbers of `dtype` are multiplied by to mean those up to `largest`."""
    return largest.clamp(min=_LEAST) / torch.finfo(dtype).max


def narrow(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x [n, d] in units of scale ([], [n, 1] or [1, d]), rounded to `dtype`."""
    return (x.float() / scale).to(dtype)


def narrow_across(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The same as [d, n]: where tokens are summed over, they must lie next to each other."""
    return narrow(x, scale, dtype).t().contiguous()


def narrow_both(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[n, d] and [d, n]."""
    small = narrow(x, scale, dtype)
    return small, small.t().contiguous()
