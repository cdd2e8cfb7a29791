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

from typing import Literal

from torch import Tensor

from stretto.collectives import all_to_all_rows_async
from stretto.experts.plan import Plan, Sorting
from stretto.experts.rows import RowOps
from stretto.streams import Stream
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
