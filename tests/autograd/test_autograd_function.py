"""Autograd functions at a lower price: they say no less than torch's own.

Faults to catch: a gradient of gradients that is silently another.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stretto.autograd import Function, adjoint

pytestmark = pytest.mark.gloo


class Square(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @adjoint
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * dy


def test_a_gradient_is_there_once_and_no_gradient_of_it() -> None:
    x = torch.tensor(3.0, requires_grad=True)
    (dx,) = torch.autograd.grad(Square.apply(x), x)  # type: ignore[no-untyped-call]
    assert (dx.item(), dx.requires_grad) == (6.0, False)
    dy = torch.tensor(2.0, requires_grad=True)
    (dx,) = torch.autograd.grad(Square.apply(x), x, dy, create_graph=True)  # type: ignore[no-untyped-call]
    assert dx.item() == 12.0
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.backward()  # type: ignore[no-untyped-call]


def test_transforms_of_functions_are_rejected() -> None:
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(Square.apply)(torch.tensor(3.0))
