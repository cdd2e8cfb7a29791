"""Masters in fp32 as bf16 weights and the 16 bits that these lack: no separate copy.

A weight is its master rounded to the nearest bf16, ties away from zero, so the difference of their bits is in
[-2^15, 2^15): any fp32 number comes back bit for bit. (With ties to even it would have 2^16 + 1 values: two ties lead
to each even weight.) A NaN stays one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

HALF: Final = 0x8000
UPPER: Final = -0x10000


def joined(weights: Tensor, remainder: Tensor) -> Tensor:
    """The masters in fp32 of weights in bf16 and remainders in int16."""
    return (weights.float().view(torch.int32) + remainder).view(torch.float32)


def parted(masters: Tensor) -> tuple[Tensor, Tensor]:
    """Of masters in fp32 the weights, still in fp32 but exact in bf16, and the remainders in int16."""
    bits = masters.view(torch.int32)
    weights = torch.where(masters == masters, bits + HALF, bits) & UPPER
    return weights.view(torch.float32), (bits - weights).to(torch.int16)


def on_remainder(update: Callable[..., None]) -> Callable[..., None]:
    """An update rule's function for such masters: `update(remainder, weights, grad, ...)`, in place of both."""

    def update_both(remainder: Tensor, weights: Tensor, grad: Tensor, *rest: Any) -> None:
        masters = joined(weights, remainder)
        update(masters, None, grad, *rest)
        for kept, new in zip((weights, remainder), parted(masters), strict=True):
            kept.copy_(new)

    return update_both
