"""Tokens to the ranks that hold their experts, and back: uneven all-to-alls in token order.

Seven messages of a layer: in the forward tokens, beside them which of these each row is of, and outputs; in the
backward the gradients of sums, once to a rank as tokens, beside them the weights of their assignments, then the
gradients of rows, and a number for each weight. Each is begun as soon as what it carries is there and waited for by the
node that takes it, so between the two another node may compute: the shared expert, a weight gradient, or another part
of the tokens.

Rows that a rank's experts make of its own tokens are in no message. They are computed apart from those of all others,
while messages are under way: the first GEMM while tokens come, the last while outputs leave, and in the backward, which
autograd takes in the opposite order, the same.

    own      rows, gate and up                                        activation, down
    others                      rows, gate and up, activation, down
    message         tokens come                                       outputs leave

The sum over slots, and over the parts of a cut expert, is in fp32 or wider and in the order of the slots: the same for
every ep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from stretto.collectives import all_to_all_rows_async
from stretto.experts.plan import Plan, Sorting, moved
from stretto.experts.rows import RowOps, of_slots
from stretto.experts.segments import Segments
from stretto.streams import Stream
from stretto.tensor_parallel import Lazy, Pointwise
from stretto.world import AsyncTensor

Message = Literal["tokens", "where", "outputs", "dout", "shares", "numbers", "drows"]
"""In the order in which they are begun; `shares` are the weights of assignments, `numbers` their gradients."""


class Part(Protocol):
    """Rows of this rank's experts, by expert, that are computed together."""

    @property
    def segments(self) -> Segments:
        """The rows of each expert."""

    def rows(self, x: Tensor) -> Tensor:
        """Those that the experts take [m, h]; x [n, h] are this rank's tokens."""

    def keep(self, outputs: Tensor) -> None:
        """What the experts make of them, which is to go to their tokens."""

    def gradients(self) -> tuple[Tensor, Tensor]:
        """The weight [m, 1] of each row, and the gradient [m, h] of its token's sum."""

    def back(self, message: Message, rows: Tensor) -> None:
        """Numbers or gradients of the rows go to their tokens."""


class Dispatch:
    """The rows of some tokens on their way, in the forward and in the backward; each message until it is waited for.

    Between the nodes of autograd there is a tensor without values where a message is under way: it has their order.
    """

    plan: Plan

    def __init__(self, sorting: Sorting, ops: RowOps) -> None:
        self.sorting: Sorting | None = sorting
        self.beside, self.ops = sorting.beside, ops
        self.exchanges = sorting.axes.exchange.size > 1
        self.leaving: Tensor | None = None
        """Tokens that are sent, as soon as it is known which."""
        self.kept: tuple[Tensor, Tensor] | None = None
        """In the backward the weights of this rank's own rows, and the gradients of their sums, until they are used."""
        self._under_way: dict[Message, AsyncTensor] = {}
        self._coming: dict[Message, Tensor] = {}
        """What comes back to this rank's tokens, its own rows before those of the others."""

    def know(self) -> Plan:
        """The plan, for which the host waits where it must."""
        if self.sorting is not None:
            self.plan, self.sorting = self.sorting.plan(), None
        return self.plan

    def own_rows(self, x: Tensor) -> Tensor:
        """[own, h]: of tokens x [n, h] the rows that this rank's experts take."""
        plan = self.know()
        return self.ops.scatter(x.detach(), plan.rows[: plan.own], plan.back)

    def offer(self, x: Tensor) -> None:
        """Make what is sent of tokens x [n, h]."""
        crossing = None if self.sorting is None else self.sorting.crossing
        if crossing is not None:
            self.leaving = self.ops.scatter(x.detach(), crossing.order, crossing.back)
            self.beside.follows(Stream.current(x.device))

    def send(self) -> None:
        """Tokens begin their way: behind what made them, not behind what came since."""
        if self.know().tokens is not None:
            assert self.leaving is not None
            with self.beside.used():
                self.there("tokens", self.leaving)
            self.leaving = None

    def tell(self) -> None:
        """Beside them, which of these each row is of: little, and no GEMM waits until the host has begun that."""
        if (tokens := self.plan.tokens) is not None:
            with self.beside.used():
                self.there("where", tokens.where)

    def backward(self, dout: Tensor, weights: Tensor) -> None:
        """Gradients of the sums [n, h], and the weights [n, K] in them, begin their way to the experts."""
        plan = self.plan
        shares = weights.reshape(-1).index_select(0, plan.rows)[:, None]
        if plan.tokens is not None:
            self.there("dout", self.ops.scatter(dout, plan.tokens.order, plan.tokens.back))
            self.there("shares", shares[plan.own :])
        self.kept = shares[: plan.own], self.own_rows(dout)

    def there(self, message: Message, rows: Tensor) -> None:
        """Rows, or tokens of which more may lie behind, begin their way to the holders of their experts."""
        plan = self.plan
        assert plan.tokens is not None
        splits = plan.tokens.splits if message in ("tokens", "dout") else plan.splits
        self._under_way[message] = all_to_all_rows_async(rows[: sum(splits.sent)], splits, plan.exchange)

    def back(self, message: Message, rows: Tensor, order: Tensor | None) -> None:
        """Rows that others' tokens made, in that order, begin their way to these."""
        plan, out = self.plan, self.coming(message, rows)[self.plan.own :]
        self._under_way[message] = all_to_all_rows_async(rows, plan.splits.back, plan.exchange, order, out)

    def coming(self, message: Message, like: Tensor) -> Tensor:
        """[own + sent, ..]: where what comes to this rank's tokens comes."""
        if message not in self._coming:
            self._coming[message] = like.new_empty((len(self.plan.rows), *like.shape[1:]))
        return self._coming[message]

    def stay(self, message: Message, rows: Tensor) -> None:
        """This rank's own rows are at their tokens: where nothing else comes, as they are."""
        if self.plan.tokens is None:
            self._coming[message] = rows
        else:
            self.coming(message, rows)[: self.plan.own].copy_(rows)

    def came(self, message: Message) -> Tensor:
        """What a message, and this rank itself, brought to its tokens, and is nobody else's any more."""
        if message in self._under_way:
            self.taken(message)
        return self._coming.pop(message)

    def taken(self, message: Message) -> Tensor:
        """What a message brings."""
        return self._under_way.pop(message).wait()

    def handed(self, message: Message) -> Tensor:
        """The same, of one that passed `beside`."""
        got = self.taken(message)
        return self.beside.hand_over(got.view_as(got))


class Own:
    """Rows of this rank's own tokens: a `Part`."""

    def __init__(self, dispatch: Dispatch) -> None:
        self._dispatch = dispatch

    @property
    def segments(self) -> Segments:
        return self._dispatch.plan.segments[0]

    def rows(self, x: Tensor) -> Tensor:
        return self._dispatch.own_rows(x)

    def keep(self, outputs: Tensor) -> None:
        self._dispatch.stay("outputs", outputs)

    def gradients(self) -> tuple[Tensor, Tensor]:
        kept, self._dispatch.kept = self._dispatch.kept, None
        assert kept is not None
        return kept

    def back(self, message: Message, rows: Tensor) -> None:
        self._dispatch.stay(message, rows)


class Others:
    """Rows of the tokens of all other ranks: a `Part`."""

    def __init__(self, dispatch: Dispatch) -> None:
        self._dispatch = dispatch
        self._sources: Tensor | None = None
        self._given: tuple[Tensor, Tensor | None] | None = None
        """Outputs, until they go, and the order in which they leave where they lie in another."""

    @property
    def segments(self) -> Segments:
        return self._dispatch.plan.segments[1]

    def rows(self, x: Tensor) -> Tensor:
        del x
        dispatch, plan = self._dispatch, self._dispatch.plan
        tokens, got = plan.tokens, dispatch.handed("tokens")
        assert tokens is not None
        total = sum(plan.splits.received)
        before = torch.repeat_interleave(tokens.before, tokens.sources, output_size=total)
        self._sources = moved(dispatch.handed("where")[:, 0] + before, plan.arrange)
        return moved(got, self._sources)

    def keep(self, outputs: Tensor) -> None:
        """By expert; or by source, where nobody puts them in that order as they leave."""
        plan = self._dispatch.plan
        engines = plan.exchange.peer_buffer is not None
        self._given = (outputs, plan.restore) if engines else (moved(outputs, plan.restore), None)

    def give(self) -> None:
        """The outputs begin their way back."""
        assert self._given is not None
        self._dispatch.back("outputs", *self._given)
        self._given = None

    def gradients(self) -> tuple[Tensor, Tensor]:
        dispatch, plan = self._dispatch, self._dispatch.plan
        assert self._sources is not None
        return moved(dispatch.taken("shares"), plan.arrange), moved(dispatch.taken("dout"), self._sources)

    def back(self, message: Message, rows: Tensor) -> None:
        self._dispatch.back(message, rows, self._dispatch.plan.restore)


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
