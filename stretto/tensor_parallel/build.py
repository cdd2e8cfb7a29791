"""`Build`: what every parallel layer is built with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stretto.world import Axis


@dataclass(frozen=True)
class Build:
    """Where a layer lies and how it is stored.

    Under `sequence_parallel` what lies outside the column -> row pairs works on this rank's part of the sequence.
    `seed` is that of the dropout masks.
    """

    tp: Axis
    sequence_parallel: bool
    dtype: torch.dtype
    device: torch.device | str = "cpu"
    seed: int = 0
