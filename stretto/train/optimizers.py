"""Optimizers as values: what a `Trainer` is given before there are parameters to update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from stretto.distributed import AdamWRule, DataParallel, LionRule, MuonRule, Optimizer, ParamGroup, Rule, SGDRule

Fuse = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Makes one kernel of an update: `torch.compile`, say."""


def flat(
    rule: Rule | MuonRule,
    *,
    groups: Sequence[ParamGroup] = (),
    moments: torch.dtype | None = None,
    fuse: Fuse | None = None,
) -> Callable[[DataParallel], Optimizer]:
    """The optimizer that applies `rule` to the flat storage of weights, wherever it is sharded."""
    return partial(Optimizer, rule=rule, groups=groups, moments=moments, fuse=fuse)


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019); parameters of one dimension do not decay."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    groups: tuple[ParamGroup, ...] = ()
    moments: torch.dtype | None = None
    fuse: Fuse | None = None

    def __call__(self, weights: DataParallel) -> Optimizer:
        """The optimizer of these weights."""
        return flat(
            AdamWRule(self.betas, self.eps, self.weight_decay), groups=self.groups, moments=self.moments, fuse=self.fuse
        )(weights)


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum, as in `torch.optim.SGD`, and decoupled weight decay."""

    momentum: float = 0.9
    weight_decay: float = 0.0
    groups: tuple[ParamGroup, ...] = ()
    moments: torch.dtype | None = None
    fuse: Fuse | None = None

    def __call__(self, weights: DataParallel) -> Optimizer:
        """The optimizer of these weights."""
        return flat(
            SGDRule(self.momentum, self.weight_decay), groups=self.groups, moments=self.moments, fuse=self.fuse
        )(weights)


@dataclass(frozen=True)
class Lion:
    """Lion (Chen et al., "Symbolic discovery of optimization algorithms", 2023)."""

    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    groups: tuple[ParamGroup, ...] = ()
    moments: torch.dtype | None = None
    fuse: Fuse | None = None

    def __call__(self, weights: DataParallel) -> Optimizer:
        """The optimizer of these weights."""
        return flat(LionRule(self.betas, self.weight_decay), groups=self.groups, moments=self.moments, fuse=self.fuse)(
            weights
        )


@dataclass(frozen=True)
class Muon:
    """Muon for matrices (Jordan et al., 2024), AdamW for embeddings, the head, norms and biases."""

    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    groups: tuple[ParamGroup, ...] = ()
    moments: torch.dtype | None = None
    fuse: Fuse | None = None

    def __call__(self, weights: DataParallel) -> Optimizer:
        """The optimizer of these weights."""
        rest = AdamWRule(self.betas, self.eps, self.weight_decay)
        return flat(MuonRule(rest, self.momentum), groups=self.groups, moments=self.moments, fuse=self.fuse)(weights)
