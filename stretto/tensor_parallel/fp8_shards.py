"""Weights that come in FP8 from the ranks that share them: each quantizes what it has, by the scale of the whole.

The scale is that of `Tensorwise`, a power of two that follows from the largest number of a matrix, so the ranks need
that alone of each other: what they quantize apart are the bits of the matrix quantized at once. W^T is made of the
bytes that have come. By rows there would be two kinds of bytes to gather, W in units of its rows and of its columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stretto.collectives import all_reduce_max
from stretto.tensor_parallel.build import WeightInFp8, unfused
from stretto.tensor_parallel.fp8 import E4M3, Tensorwise, meaning
from stretto.world import Axis


def quantize_(out: Tensor, x: Tensor, scale: Tensor) -> None:
    """x [n] in units of its scale [1], into `out` [n] in fp8."""
    out.copy_(x.float() * (1 / scale))


def transpose_(out: Tensor, x: Tensor) -> None:
    """x [n, d] across, into `out` [d, n]."""
    out.copy_(x.t())


class WeightQuantizer:
    """Quantizes what this rank has of the matrices of `gemms`; gives those that have come back to it."""

    dtype = E4M3

    def __init__(self, gemms: Tensorwise, fuse: Callable[[Callable[..., Any]], Callable[..., Any]] = unfused) -> None:
        self.gemms = gemms
        self.quantize_, self.transpose_ = fuse(quantize_), fuse(transpose_)

    def takes(self, weight: nn.Parameter) -> bool:
        """Whether nothing but GEMMs in FP8 reads it."""
        return weight in self.gemms.matrices

    def scales(self, parts: Sequence[Tensor], over: Axis) -> Tensor:
        """The scale of each matrix, [n] in fp32, of which `parts` are what this rank has: the ranks of `over` and of
        tp have the rest. A part may be empty."""
        held = [part for part in parts if part.numel()]
        found = iter(torch._foreach_norm(held, math.inf) if held else ())
        none = parts[0].new_zeros(())
        largest = torch.stack([next(found) if part.numel() else none for part in parts]).float()
        # Numbers that are not negative are in the order of their bits, with NaN behind all others.
        bits = all_reduce_max(largest.abs().view(torch.int32), over)
        return meaning(all_reduce_max(bits, self.gemms.tp).view(torch.float32), E4M3)

    def give(self, weights: Mapping[nn.Parameter, WeightInFp8]) -> None:
        """From now on the GEMMs read these."""
        self.gemms.gathered = weights
