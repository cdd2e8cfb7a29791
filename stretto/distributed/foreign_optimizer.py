"""An optimizer of `torch.optim` over parameters whose gradients lie in buckets: it would train nothing, silently."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Final, Protocol

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

UPDATES: Final = (
    "an optimizer of torch.optim sees no gradients of these parameters, so it trains nothing; take "
    "`optimizer = sharded.optimizer(stretto.AdamW(...))` and its step(lr) after stretto.shard, "
    "`optimizer=stretto.AdamW(...)` in a Trainer"
)


class Names(Protocol):
    """What says which parameters it holds."""

    def name_of(self, param: nn.Parameter) -> str | None:
        """Its name, where it is held here and wants a gradient."""


def reject_steps(weights: Names) -> Callable[[], object]:
    """From now on a step of torch's optimizers over parameters of `weights` is a RuntimeError; returns what ends that.

    The hook is one of all optimizers, so it does not keep the weights.
    """
    ours = weakref.ref(weights)

    def reject(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if (here := ours()) is None:
            return
        held = (here.name_of(param) for group in optimizer.param_groups for param in group["params"])
        if name := next((name for name in held if name is not None), None):
            raise RuntimeError(f"{type(optimizer).__name__} holds {name}, which is in a bucket of stretto: {UPDATES}")

    return weakref.finalize(weights, register_optimizer_step_pre_hook(reject).remove)
