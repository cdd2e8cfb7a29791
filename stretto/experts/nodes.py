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
from stretto.experts.rows import of_slots
from stretto.tensor_parallel import Lazy, Pointwise


def enter(x: Tensor, dispatch: Dispatch) -> tuple[Tensor, Tensor]:
    """Tokens x [n, h] for the router, and what stands for those that experts get. The gradients of both are added up
    in one pass."""
    return _Enter.apply(x, dispatch)  # type: ignore[no-any-return, no-untyped-call]


def receive(entered: Tensor, x: Tensor, part: Part, flush: Callable[[], object]) -> Tensor:
    """The rows [m, h] of a part, of tokens x. `flush` is called when their gradient is on its way."""
    return _Receive.apply(entered, x.detach(), part, flush)  # type: ignore[no-any-return, no-untyped-call]


def regathered(entered: Tensor, x: Tensor, dispatch: Dispatch) -> Lazy:
    """What arrives where no rank exchanges with another, for a GEMM that takes it from x [n, h] forward and again in
    the backward: it is never kept."""
    dispatch.know()

    def forward(_: Tensor, x: Tensor) -> Tensor:
        return dispatch.own_rows(x)

    def backward(dy: Tensor, entered: Tensor, x: Tensor) -> tuple[Any, ...]:
        del entered, x
        dispatch.stay("drows", dy)
        return dy.new_empty(()), None

    def both(dy: Tensor, entered: Tensor, x: Tensor) -> tuple[Any, ...]:
        return forward(entered, x), *backward(dy, entered, x)

    return Lazy(Pointwise(forward, backward, both, recompute=True), (entered, x.detach()))


def weigh(weights: Tensor, dispatch: Dispatch) -> Tensor:
    """Stands for the weights [n, K] of the assignments, whose gradients come back from the experts."""
    return _Weigh.apply(weights, dispatch)  # type: ignore[no-any-return, no-untyped-call]


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dispatch: Dispatch) -> tuple[Tensor, Tensor]:
        ctx.dispatch = dispatch
        ctx.set_materialize_grads(False)
        return x.view_as(x), x.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_router: Tensor | None, _: Tensor) -> tuple[Tensor, None]:
        dispatch: Dispatch = ctx.dispatch
        return dispatch.ops.sum(*dispatch.came("drows"), dispatch.plan.back, of_router), None


class _Receive(Function):
    @staticmethod
    def forward(ctx: Any, entered: Tensor, x: Tensor, part: Part, flush: Callable[[], object]) -> Tensor:
        del entered
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
        dispatch: Dispatch = ctx.dispatch
        return of_slots(*dispatch.came("numbers"), dispatch.plan.back), None
