"""Optimizers as values: what a `Trainer` is given before there are parameters to update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stretto.distributed import AdamW as FlatAdamW
from stretto.distributed import DataParallel


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019); parameters of one dimension do not decay."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    fuse: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
    """Makes one kernel of the update: `torch.compile`, say."""

    def __call__(self, weights: DataParallel) -> FlatAdamW:
        """The optimizer of these weights."""
        return FlatAdamW(weights, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fuse=self.fuse)
