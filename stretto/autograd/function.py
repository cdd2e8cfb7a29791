"""Autograd functions at a lower price to the host.

`torch.autograd.Function` asks at each forward whether a transform of `torch.func` is at work, and `once_differentiable`
enters two contexts at each backward: 4 of 11 microseconds of an empty function on one CPU, and a layer has eight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd.function import once_differentiable


class Function(torch.autograd.Function):
    """One whose `apply` is that of C++ itself, which rejects transforms of `torch.func` as well."""

    def __init_subclass__(cls) -> None:
        cls.apply = super(torch.autograd.Function, cls).apply  # type: ignore[method-assign, misc]


def adjoint(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`once_differentiable`, whose contexts are entered only where somebody may differentiate the gradients."""
    careful = once_differentiable(backward)

    @wraps(backward)
    def run(ctx: Any, *gradients: Any) -> Any:
        return careful(ctx, *gradients) if torch.is_grad_enabled() else backward(ctx, *gradients)

    return run
