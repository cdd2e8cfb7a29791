"""Tokens to their experts as functions of autograd: one begins each message, another waits for it.

Between them there is a tensor without values where a message is under way: it has their order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from stretto.experts.dispatch import Dispatch
from stretto.experts.parts import Part
from stretto.experts.plan import Plan
from stretto.experts.rows import RowOps, of_slots
from stretto.tensor_parallel import Lazy, Pointwise


def offer(x: Tensor, dispatch: Dispatch) -> Tensor:
    """Tokens x [n, h] are about to be sent; what is returned stands for them until `receive`."""
    return _Offer.apply(x, dispatch)  # type: ignore[no-any-return, no-untyped-call]


def receive(offered: Tensor, x: Tensor, part: Part, flush: Callable[[], object]) -> Tensor:
    """The rows [m, h] of a part, of tokens x. `flush` is called when their gradient is on its way."""
    return _Receive.apply(offered, x.detach(), part, flush)  # type: ignore[no-any-return, no-untyped-call]


def regathered(x: Tensor, plan: Plan, ops: RowOps) -> Lazy:
    """What arrives where no rank exchanges with another, for a GEMM that takes it from x [n, h] forward and again in
    the backward: it is never kept."""

    def forward(x: Tensor) -> Tensor:
        return ops.scatter(x, plan.rows, plan.back)

    def backward(dy: Tensor, x: Tensor) -> tuple[Tensor]:
        del x
        return (ops.sum(dy, plan.back),)

    def both(dy: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return forward(x), *backward(dy, x)

    return Lazy(Pointwise(forward, backward, both, recompute=True), (x,))


def weigh(weights: Tensor, dispatch: Dispatch) -> Tensor:
    """Stands for the weights [n, K] of the assignments, whose gradients come back from the experts."""
    return _Weigh.apply(weights, dispatch)  # type: ignore[no-any-return, no-untyped-call]


class _Offer(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        dispatch.offer(x)
        return x.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        dispatch: Dispatch = ctx.dispatch
        return dispatch.ops.sum(dispatch.came("drows"), dispatch.plan.back), None


class _Receive(Function):
    @staticmethod
    def forward(ctx: Any, offered: Tensor, x: Tensor, part: Part, flush: Callable[[], object]) -> Tensor:
        del offered
        ctx.part, ctx.flush = part, flush
        return part.rows(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.part.back("drows", dy)
        ctx.flush()
        return dy.new_empty(()), None, None, None


class _Weigh(Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        return weights.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return of_slots(ctx.dispatch.came("numbers"), ctx.dispatch.plan.back), None
