"""Which rows go where: what the device knows by itself, and what ranks tell each other.

Each assignment (token t, slot k) is a row. A rank has its rows sorted by expert, within one by assignment, so by token:
those of its own experts first, which go nowhere, then those of the other ranks' in their order. A token crosses once to
each rank that holds any of its experts, and its rows are made there, arranged by expert, within one by source. No row
lies beyond the last one: nothing is padded. An expert that is cut over etp has its rows on all of its ranks, and what
these give back are parts of a sum.

The sizes of an uneven all-to-all are needed on the host, so it waits for the device once a layer, in the forward. A
rank that exchanges nothing waits for none unless tokens are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from stretto.collectives import all_gather_async
from stretto.experts.crossing import Crossing
from stretto.experts.host import to_host
from stretto.experts.rows import RowOps
from stretto.experts.segments import Segments
from stretto.streams import Stream
from stretto.world import Axis, Done, ExpertAxes, RowSplits, Work


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens that cross to other ranks: `leaving` [as many as leave] says which, and `splits` how many go to each rank,
    and come. `where` [sent, 1]: of each row that another rank makes, where its token is among those that go there. Of
    what comes, `sources` [ranks] has the rows of each rank, and `before` its tokens of the ranks before."""

    leaving: Tensor
    splits: RowSplits
    where: Tensor
    sources: Tensor
    before: Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """Which rows go where. Tensors are on the device, sizes on the host.

    `rows` [own + sent]: the assignment t * K + k of each row, the `own` first that this rank's experts take. `back`
    [etp, n, K]: where in these each assignment's are; beyond the last of them where it was dropped. `splits`: how many
    rows others make for this rank, and it for each of them. `counts` [other sources, experts]: what this rank's experts
    get from each of the others. `segments`: the rows of each expert here, of this rank's tokens and, where ranks
    exchange any, of all others'.
    """

    exchange: Axis
    rows: Tensor
    back: Tensor
    own: int
    splits: RowSplits
    counts: Tensor
    tokens: Tokens | None
    segments: tuple[Segments, ...]
    ops: RowOps

    @cached_property
    def _orders(self) -> tuple[Tensor, Tensor]:
        return self.ops.by_expert(self.counts, sum(self.splits.received))

    @property
    def arrange(self) -> Tensor | None:
        """[received]: the rows that others' tokens make, in the order of the experts; None: of one other they are."""
        return None if len(self.counts) == 1 else self._orders[0]

    @property
    def restore(self) -> Tensor | None:
        """The inverse of `arrange`."""
        return None if len(self.counts) == 1 else self._orders[1]


class Sorting:
    """The assignments `experts` [n, K] of this rank's tokens by expert: a plan that is being made.

    `kept` [n, K] says which are not dropped. What ranks tell each other passes `beside` the computation.
    """

    def __init__(
        self,
        experts: Tensor,
        number: int,
        axes: ExpertAxes,
        kept: Tensor | None = None,
        beside: Stream = Stream(),  # noqa: B008  # frozen
        ops: RowOps = RowOps(),  # noqa: B008
    ) -> None:
        n, k = experts.shape
        self.axes, self.number, self.dropped, self.beside, self.ops = axes, number, kept is not None, beside, ops
        self.local = number // axes.ep.size
        self._of = (experts if kept is None else torch.where(kept, experts, number)).reshape(-1)
        sorted_ = self.ops.sort(self._own_first(self._of), number, self.dropped)
        self._order, place, self._counts, self._of_experts = sorted_
        self.places = place.view(1, n, k)
        """`back` of the plan where it is known with `rows`."""
        self.crossing = None if axes.exchange.size == 1 else Crossing.of(self._holders().view(n, k), axes)
        self._asked: Work = Done()
        self._ends: tuple[Tensor, ...] = ()
        self._read: Callable[[], list[Any]] | None = None
        beside.follows(Stream.current(experts.device))

    @property
    def rows(self) -> Tensor | None:
        """Those of the plan, where they are known before the host has read anything."""
        return self._order if self.axes.etp.size == 1 and not self.dropped else None

    def ask(self) -> None:
        """All ranks of the exchange tell each other how many rows come, which are on their way to the host then. What
        follows from that on the device alone is computed now: it must not wait for the host as well."""
        axes, exchange = self.axes, self.axes.exchange
        if exchange.size == 1:
            self._read, self._ends = to_host(self._counts[None]), (self._of_experts,)
            return
        with self.beside.used():
            assert self.crossing is not None
            of_ep = self._counts.view(-1, self.local).unbind()
            at = {ep: n for n, ep in enumerate(self._first(axes.ep.rank, axes.ep.size))}
            of_each = torch.stack([of_ep[at[ep]] for ep, _ in axes.places])  # [ranks, local experts]
            to_each = torch.cat([of_each, self.crossing.number[:, None]], 1)  # rows of each expert, and tokens
            every = all_gather_async(to_each, exchange).wait().view(exchange.size, *to_each.shape)
            mine = every[:, exchange.rank]
            # Who reads of another must know what lies before.
            self._read = to_host(torch.cat([to_each, mine]) if exchange.peer_buffer is None else every)
            me, tokens = exchange.rank, mine[:, -1]
            self._here = torch.cat([mine[:me, :-1], mine[me + 1 :, :-1]])
            self._ends = _ends(mine[me : me + 1, :-1]), _ends(self._here)
            self._sources, self._before = mine[:, :-1].sum(1), (tokens.cumsum(0) - tokens).to(torch.int32)
            self._sources[me].zero_()
            self._where = self.crossing.place
            if self.rows is not None:
                self._where = self._where.index_select(0, self.rows)
            self._asked = self.beside.launched()

    def plan(self) -> Plan:
        """The plan. The host waits for the device, unless this rank exchanges nothing and drops nothing."""
        if self._read is None:
            self.ask()
        assert self._read is not None
        exchange, order, read = self.axes.exchange, self._order, self._read
        if exchange.size == 1:  # those that were dropped are the last in `order`
            total = sum(read()[0]) if self.dropped else len(order)
            rows, none = order[:total], RowSplits([0], [0])
            segments = (Segments(read, self._ends[0]),)
            return Plan(exchange, rows, self.places, total, none, self._counts[:0], None, segments, self.ops)
        assert self.crossing is not None
        sizes, me = read(), exchange.rank  # the one wait of the host
        if exchange.peer_buffer is None:
            sent, theirs = sizes[: exchange.size], sizes[exchange.size :]
            splits = [RowSplits(_others(sent, me, of), _others(theirs, me, of)) for of in (_rows, _tokens)]
        else:
            sent, theirs = sizes[me], [of[me] for of in sizes]
            pairs = [[_others(each, rank, of) for rank, each in enumerate(sizes)] for of in (_rows, _tokens)]
            splits = [RowSplits.of_pairs(each, me) for each in pairs]
        of_rows, of_tokens = splits
        own, (rows, back) = _rows(sent[me]), (order, self.places)
        if self.rows is None:
            with self.beside.used():  # where the places of their tokens leave, and may be early
                rows, back = self._of_ranks([_rows(each) for each in sent])
                self._where = self._where.index_select(0, rows)
                self._asked = self.beside.launched()
            rows, back = map(self.beside.hand_over, (rows, back))
        self._asked.wait()
        made = (self._here, *self._ends, self._where, self._sources, self._before)
        here, own_ends, ends, where, sources, before = map(self.beside.hand_over, made)
        counts = [each[:-1] for each in theirs]
        others = [each for rank, each in enumerate(counts) if rank != me]
        both = Segments(lambda: [counts[me]], own_ends), Segments(lambda: others, ends)
        leaving = self.crossing.tokens[: sum(of_tokens.sent)]
        tokens = Tokens(leaving, of_tokens, where[own:, None], sources, before)
        return Plan(exchange, rows, back, own, of_rows, here, tokens, both, self.ops)

    def _first(self, own: int, size: int) -> list[int]:
        """So many, that one first."""
        return [own, *(n for n in range(size) if n != own)]

    def _own_first(self, experts: Tensor) -> Tensor:
        """Experts by new numbers, of which this rank's own have the lowest."""
        begin, end = self.axes.ep.rank * self.local, (self.axes.ep.rank + 1) * self.local
        if not begin:
            return experts
        own = torch.where(experts < end, experts - begin, experts)
        return torch.where(experts < begin, experts + self.local, own)

    def _holders(self) -> Tensor:
        """[n * K]: as `Crossing.of` wants them."""
        return (self._of // self.local).long()

    def _of_ranks(self, sent: Sequence[int]) -> tuple[Tensor, Tensor]:
        """`rows` and `back` where a row goes to several ranks, or to none."""
        axes = self.axes
        # Where the rows of each ep coordinate begin in the sorted order, and those of each rank among what is sent.
        of_ep = {ep: total for (ep, _), total in zip(axes.places, sent, strict=True)}
        eps, ranks = self._first(axes.ep.rank, axes.ep.size), self._first(axes.exchange.rank, axes.exchange.size)
        first = dict(zip(eps, accumulate((of_ep[ep] for ep in eps), initial=0), strict=False))
        begins = list(accumulate((sent[rank] for rank in ranks), initial=0))
        to = [(*axes.places[rank], sent[rank]) for rank in ranks]
        parts = [self._order[first[ep] : first[ep] + n] for ep, _, n in to]
        shift = torch.zeros((axes.etp.size, axes.ep.size + 1), dtype=torch.int64)
        for begin, (ep, etp, _) in zip(begins, to, strict=False):
            shift[etp, ep] = begin - first[ep]
        back = self.places.flatten() + shift.to(self._of.device)[:, self._holders()]
        if self.dropped:
            back = torch.where(self._of < self.number, back, begins[-1])
        return torch.cat(parts), back.view(axes.etp.size, *self.places.shape[1:])


def _others(each: Sequence[Sequence[int]], me: int, of: Callable[[Sequence[int]], int]) -> list[int]:
    """Of what goes to each rank, or comes, what crosses: none to itself."""
    return [0 if rank == me else of(told) for rank, told in enumerate(each)]


def _ends(counts: Tensor) -> Tensor:
    """[experts] int32: where the rows of each end, of `counts` [sources, experts]."""
    return counts.sum(0).cumsum(0).to(torch.int32)


def _rows(told: Sequence[int]) -> int:
    """Of what one rank tells another."""
    return sum(told[:-1])


def _tokens(told: Sequence[int]) -> int:
    return told[-1]


def moved(rows: Tensor, order: Tensor | None) -> Tensor:
    """Rows in another order; None: in their own."""
    return rows if order is None else rows.index_select(0, order)
