"""Optimizers as values: what a `Trainer` is given before there are parameters to update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch

from stretto.arguments.schema import OptimizerConfig
from stretto.distributed import AdamWRule, DataParallel, LionRule, MuonRule, Optimizer, ParamGroup, Rule, SGDRule
from stretto.distributed.optimizer import Fuse
from stretto.kernels import fused
from stretto.notation.param_groups import parse_groups
from stretto.train.dtypes import DTYPES


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What all optimizers may be told: see `stretto.distributed.Optimizer`."""

    groups: tuple[ParamGroup, ...] = ()
    moments: torch.dtype | None = None
    remainder: bool = False
    cpu_offload: bool = False
    fuse: Fuse | None = None
    """None: by a kernel on a GPU, `stretto.kernels.fused`; elsewhere as torch computes it."""

    def __call__(self, weights: DataParallel) -> Optimizer:
        """The optimizer of these weights."""
        options = {each.name: getattr(self, each.name) for each in fields(_Options)}
        if self.fuse is None and weights.state.world.device.type == "cuda":
            options["fuse"] = partial(fused, dynamic=True)
        return Optimizer(weights, rule=self._rule(), **options)

    def _rule(self) -> Rule | MuonRule:
        raise NotImplementedError


@dataclass(frozen=True)
class AdamW(_Options):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019); parameters of one dimension do not decay."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1

    def _rule(self) -> AdamWRule:
        return AdamWRule(self.betas, self.eps, self.weight_decay)


@dataclass(frozen=True)
class SGD(_Options):
    """Gradient descent with momentum, and the decay added to the gradient, as in `torch.optim.SGD`."""

    momentum: float = 0.9
    weight_decay: float = 0.0

    def _rule(self) -> SGDRule:
        return SGDRule(self.momentum, self.weight_decay)


@dataclass(frozen=True)
class Lion(_Options):
    """Lion (Chen et al., "Symbolic discovery of optimization algorithms", 2023)."""

    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1

    def _rule(self) -> LionRule:
        return LionRule(self.betas, self.weight_decay)


@dataclass(frozen=True)
class Muon(_Options):
    """Muon for matrices (Jordan et al., 2024), AdamW for embeddings, the head, norms and biases."""

    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1

    def _rule(self) -> MuonRule:
        return MuonRule(AdamWRule(self.betas, self.eps, self.weight_decay), self.momentum)


def optimizer_of(config: OptimizerConfig, fuse: Fuse) -> Callable[[DataParallel], Optimizer]:
    """The optimizer of the settings; `fuse` makes one kernel of an update."""
    options: dict[str, Any] = {
        "weight_decay": config.weight_decay,
        "groups": parse_groups(config.param_groups),
        "moments": DTYPES[config.moments] if config.moments == "bf16" else None,
        "remainder": config.masters == "remainder",
        "cpu_offload": config.optimizer_cpu_offload,
        "fuse": fuse,
    }
    betas = (config.beta1, config.beta2)
    match config.optimizer:
        case "sgd":
            return SGD(momentum=config.momentum, **options)
        case "lion":
            return Lion(betas=betas, **options)
        case "muon":
            return Muon(momentum=config.momentum, betas=betas, eps=config.eps, **options)
    return AdamW(betas=betas, eps=config.eps, **options)
