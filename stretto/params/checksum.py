"""Checksums of tensors that should be the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(x: Tensor) -> Tensor:
    """[] in int64: changes with any one bit of `x`, and with the order of its rows."""
    x = torch.view_as_real(x.detach().resolve_conj()) if x.is_complex() else x.detach()
    bits = x.contiguous().view(_BITS[x.element_size()])
    rows = bits.flatten(0, -2).sum(-1, dtype=torch.int64) if bits.dim() > 1 else bits.reshape(-1).long()
    # Odd weights: a difference in any bit of a row is one in the sum, modulo 2^64.
    return (rows * (2 * torch.arange(rows.numel(), device=x.device) + 1)).sum()


def read_together(numbers: Sequence[Tensor]) -> list[Any]:
    """Numbers [] in order, each device read once."""
    found: list[Any] = [None] * len(numbers)
    for device in {x.device for x in numbers}:
        chosen = [n for n, x in enumerate(numbers) if x.device == device]
        for n, value in zip(chosen, torch.stack([numbers[n] for n in chosen]).tolist(), strict=True):
            found[n] = value
    return found
