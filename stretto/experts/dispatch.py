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
from stretto.experts.plan import Plan, Sorting, moved
from stretto.experts.rows import RowOps
from stretto.streams import Stream
from stretto.world import AsyncTensor, ExpertAxes

Message = Literal["tokens", "where", "outputs", "dout", "shares", "numbers", "drows"]
"""In the order in which they are begun; `shares` are the weights of assignments, `numbers` their gradients."""


class Dispatch:
    """The rows of some tokens on their way, in the forward and in the backward; each message until it is waited for.

    Between the nodes of autograd there is a tensor without values where a message is under way: it has their order.
    """

    plan: Plan

    def __init__(self, axes: ExpertAxes, ops: RowOps, beside: Stream) -> None:
        self.sorting: Sorting | None = None
        """Until the plan is known."""
        self.ops, self.beside = ops, beside
        self.exchanges = axes.exchange.size > 1
        self.engines = axes.exchange.peer_buffer is not None
        self.leaving: Tensor | None = None
        """What is sent of the tokens; all of them where copy engines are to read it: it is made where they do."""
        self.kept: tuple[Tensor, Tensor] | None = None
        """In the backward the weights of this rank's own rows, and the gradients of their sums, until they are used."""
        self._under_way: dict[Message, AsyncTensor] = {}
        self._own: dict[Message, Tensor] = {}
        """What this rank's own rows bring to their tokens."""

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
        """Make what is sent of tokens x [n, h], as long as the host waits for how much that is."""
        assert self.sorting is not None
        assert self.sorting.crossing is not None
        self.leaving = x.detach() if self.engines else moved(x.detach(), self.sorting.crossing.tokens)
        self.beside.follows(Stream.current(x.device))

    def send(self) -> None:
        """Tokens begin their way: behind what made them, not behind what came since."""
        tokens = self.know().tokens
        assert tokens is not None
        assert self.leaving is not None
        with self.beside.used():
            self.there("tokens", self.leaving, tokens.leaving if self.engines else None)
        self.leaving = None

    def tell(self) -> None:
        """Beside them, which of these each row is of: little, and no GEMM waits until the host has begun that."""
        assert self.plan.tokens is not None
        with self.beside.used():
            self.there("where", self.plan.tokens.where)

    def backward(self, dout: Tensor, weights: Tensor) -> None:
        """Gradients of the sums [n, h], and the weights [n, K] in them, begin their way to the experts."""
        plan = self.plan
        shares = weights.reshape(-1).index_select(0, plan.rows)[:, None]
        if plan.tokens is not None:
            self.there("dout", dout, plan.tokens.leaving)
            self.there("shares", shares[plan.own :])
        self.kept = shares[: plan.own], self.own_rows(dout)

    def there(self, message: Message, rows: Tensor, order: Tensor | None = None) -> None:
        """Rows or tokens, or those of an order, begin their way to the holders of their experts; more may lie
        behind."""
        plan = self.plan
        assert plan.tokens is not None
        splits = plan.tokens.splits if message in ("tokens", "dout") else plan.splits
        rows = rows[: sum(splits.sent)] if order is None else rows
        self._under_way[message] = all_to_all_rows_async(rows, splits, plan.exchange, order)

    def back(self, message: Message, rows: Tensor, order: Tensor | None) -> None:
        """Rows that others' tokens made, in that order, begin their way to these."""
        self._under_way[message] = all_to_all_rows_async(rows, self.plan.splits.back, self.plan.exchange, order)

    def stay(self, message: Message, rows: Tensor) -> None:
        """This rank's own rows are at their tokens."""
        self._own[message] = rows

    def came(self, message: Message) -> tuple[Tensor, Tensor | None]:
        """What this rank itself, and a message, brought to its tokens, and is nobody else's any more."""
        return self._own.pop(message), self.taken(message) if self.exchanges else None

    def taken(self, message: Message) -> Tensor:
        """What a message brings."""
        return self._under_way.pop(message).wait()

    def handed(self, message: Message) -> Tensor:
        """The same, of one that passed `beside`."""
        got = self.taken(message)
        return self.beside.hand_over(got.view_as(got))
