"""The quickest kernels of a formula on this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from stretto.kernels.hand_written import hand_written
from stretto.kernels.unguarded import compiled


def fused(function: Callable[..., Any], *, dynamic: bool | None = None) -> Callable[..., Any]:
    """One kernel for each chain of elementwise operations in `function`, made when shapes are first seen.

    `dynamic` makes one for all sizes at once: buckets have many. Activations have one, until a sample is drawn. On a
    GPU a hand-written kernel goes first.
    """
    kernels = torch.compile(function, dynamic=dynamic) if dynamic else compiled(function)
    return hand_written(function, kernels) if torch.cuda.is_available() else kernels
