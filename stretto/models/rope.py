"""Rotary position embedding (Su et al., "RoFormer", 2021), halves rotated against each other as in Llama."""

from __future__ import annotations

import torch
from torch import Tensor


def rotation(
    seq_len: int, dim: int, base: float, *, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """cos and sin [s, 1, 1, dim] of the angles of positions 0..s-1: pair i of a head turns by pos / base^(2i/dim).

    Computed in fp64, so that every dtype gets the nearest value whatever the position.
    """
    frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
    angle = torch.arange(seq_len, dtype=torch.float64, device=device)[:, None] * frequency
    angle = torch.cat([angle, angle], -1)[:, None, None, :]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(q: Tensor, k: Tensor, cos_sin: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Turn each head of q [s, b, heads, d] and k [s, b, kv_heads, d] by the angle of its position."""
    return _turn(q, *cos_sin), _turn(k, *cos_sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin
