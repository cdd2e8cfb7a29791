"""Regions of a block that the backward recomputes, to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stretto.tensor_parallel import Lazy, Pointwise


def recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """`function(*inputs)`, of which only the inputs are kept. No state of a generator is to be restored: masks are
    functions of places."""
    y: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return y


def unkept(function: Callable[..., Tensor], *inputs: Tensor) -> Lazy:
    """The output of `function` for the GEMM that takes it, which computes it and recomputes it in its backward: there
    with its gradients, from one forward."""

    def forward(*inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    def both(dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in inputs]
            y = function(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    return Lazy(Pointwise(forward, lambda dy, *inputs: both(dy, *inputs)[1:], both, recompute=True), inputs)
