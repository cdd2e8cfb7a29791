"""Tokens to the ranks that hold their experts, and back: uneven all-to-alls in token order.

Seven messages of a layer: in the forward tokens, beside them which of these each row is of, and outputs; in the
backward the gradients of sums, once to a rank as tokens, beside them the weights of their assignments, then the
gradients of rows, and a number for each weight. Each is begun as soon as what it carries is there and waited for by the
node that takes it, so between the two another node may compute: the shared expert, a weight gradient, or another part
of the tokens.

The sum over slots, and over the parts of a cut expert, is in fp32 or wider and in the order of the slots: the same for
every ep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from stretto.collectives import all_to_all_rows_async
from stretto.experts.plan import Plan, Sorting, moved
from stretto.experts.rows import RowOps, of_slots
from stretto.streams import Stream
from stretto.tensor_parallel import Lazy, Pointwise
from stretto.world import AsyncTensor

Message = Literal["tokens", "where", "outputs", "dout", "shares", "numbers", "drows"]
"""In the order in which they are begun; `shares` are the weights of assignments, `numbers` their gradients."""


class Dispatch:
    """The rows of some tokens on their way, in the forward and in the backward; each message until it is waited for.

    Between the nodes of autograd there is a tensor without values where a message is under way: it has their order.
    """

    plan: Plan

    def __init__(self, sorting: Sorting, ops: RowOps) -> None:
        self.sorting: Sorting | None = sorting
        self.beside, self.ops = sorting.beside, ops
        self.leaving: Tensor | None = None
        """Tokens that are sent, or rows where nothing is exchanged, as soon as it is known which."""
        self._sources: Tensor | None = None
        self.given: tuple[Tensor, Tensor | None] | None = None
        """The outputs of this rank's experts, until they go, and the order in which they leave where they lie in
        another."""
        self._under_way: dict[Message, AsyncTensor] = {}

    def know(self) -> Plan:
        """The plan, for which the host waits where it must."""
        if self.sorting is not None:
            self.plan, self.sorting = self.sorting.plan(), None
        return self.plan

    def send(self, x: Tensor) -> None:
        """Tokens x [n, h] begin their way: behind what made them, not behind what came since."""
        plan = self.know()
        if self.leaving is None:
            self.scatter(x, *plan.leaving)
        assert self.leaving is not None
        with self.beside.used():
            self.there("tokens", self.leaving)
            if plan.tokens is not None:
                self.there("where", plan.tokens.where)
        self.leaving = None

    def scatter(self, x: Tensor, order: Tensor, back: Tensor) -> None:
        """Make what is sent of tokens x."""
        self.leaving = self.ops.scatter(x.detach(), order, back)
        self.beside.follows(Stream.current(x.device))

    def arrived(self) -> Tensor:
        """The rows of this rank's experts [m, h], by expert."""
        got = self._handed("tokens")
        if self.plan.tokens is not None:
            self._sources = moved(self._handed("where")[:, 0], self.plan.arrange)
        return moved(got, self._sources)

    def back_at_experts(self) -> Tensor:
        """The gradients of sums for the rows of this rank's experts [m, h], by expert."""
        return moved(self.taken("dout"), self._sources)

    def give(self) -> None:
        """The outputs begin their way back."""
        assert self.given is not None
        self.back("outputs", *self.given)
        self.given = None

    def there(self, message: Message, rows: Tensor) -> None:
        """Rows, or tokens of which more may lie behind, begin their way to the holders of their experts."""
        plan = self.plan
        tokens = plan.tokens if message in ("tokens", "dout") else None
        splits = plan.splits if tokens is None else tokens.splits
        self._under_way[message] = all_to_all_rows_async(rows[: sum(splits.sent)], splits, plan.exchange)

    def keep(self, outputs: Tensor) -> None:
        """The outputs lie ready by expert; or by source, where nobody puts them in that order as they leave."""
        order = self.plan.restore
        engines = self.plan.exchange.peer_buffer is not None
        self.given = (outputs, order) if engines else (moved(outputs, order), None)

    def back(self, message: Message, rows: Tensor, order: Tensor | None) -> None:
        """Rows of this rank's experts, in that order, begin their way to the ranks of their tokens."""
        plan = self.plan
        self._under_way[message] = all_to_all_rows_async(rows, plan.splits.back, plan.exchange, order)

    def taken(self, message: Message) -> Tensor:
        """What a message brings, which is nobody else's any more."""
        return self._under_way.pop(message).wait()

    def _handed(self, message: Message) -> Tensor:
        """The same, of one that passed `beside`."""
        got = self.taken(message)
        return self.beside.hand_over(got.view_as(got))


def offer(x: Tensor, dispatch: Dispatch) -> Tensor:
    """Tokens x [n, h] are about to be sent; what is returned stands for them until `receive`."""
    return _Offer.apply(x, dispatch)  # type: ignore[no-any-return, no-untyped-call]


def receive(offered: Tensor, dispatch: Dispatch, flush: Callable[[], object]) -> Tensor:
    """What arrived [m, h], arranged by expert. `flush` is called while the gradient is on its way."""
    return _Receive.apply(offered, dispatch, flush)  # type: ignore[no-any-return, no-untyped-call]


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
        ctx.dispatch, sorting = dispatch, dispatch.sorting
        if sorting is not None and sorting.leaving is not None:
            dispatch.scatter(x, *sorting.leaving)
        return x.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        dispatch: Dispatch = ctx.dispatch
        return dispatch.ops.sum(dispatch.taken("drows"), dispatch.plan.back), None


class _Receive(Function):
    @staticmethod
    def forward(ctx: Any, offered: Tensor, dispatch: Dispatch, flush: Callable[[], object]) -> Tensor:
        del offered
        ctx.dispatch, ctx.flush = dispatch, flush
        return dispatch.arrived()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        plan = ctx.dispatch.plan
        ctx.dispatch.back("drows", dy, plan.restore)
        if plan.exchange.size > 1:
            ctx.flush()
        return dy.new_empty(()), None, None


class _Weigh(Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        return weights.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return of_slots(ctx.dispatch.taken("numbers"), ctx.dispatch.plan.back), None
