"""Which rows go where: what the device knows by itself, and what ranks tell each other.

Each assignment (token t, slot k) is a row. A rank has the rows that go to others sorted by expert, within one by
assignment, so by token; at their experts they are arranged by expert, within one by source. A token crosses once to
each rank that holds any of its experts, and its rows are made there. No row lies beyond the last one: nothing is
padded. An expert that is cut over etp has its rows on all of its ranks, and what these give back are parts of a sum.

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
    """Tokens that cross: `splits` says how many go to each rank, and come. `where` [sent, 1]: of each row, where its
    token is among all that come to the same rank."""

    splits: RowSplits
    where: Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """Which rows go where. Tensors are on the device, sizes on the host.

    `rows` [sent]: the assignment t * K + k of each row that is sent. `back` [etp, n, K]: where in the rows that come
    back each assignment's are; beyond the last of them where it was dropped. `splits`: how many rows go from this rank
    to each, and come. `counts` [sources, experts]: what this rank's experts get from each rank. `leaving`: what is made
    of the tokens, and where in that each is, for `RowOps.scatter`: `tokens` that cross, or the rows themselves where no
    rank exchanges with another. `segments`: the rows of each expert here.
    """

    exchange: Axis
    leaving: tuple[Tensor, Tensor]
    rows: Tensor
    back: Tensor
    splits: RowSplits
    counts: Tensor
    tokens: Tokens | None
    segments: Segments
    ops: RowOps

    @cached_property
    def _orders(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        # On one rank rows have that order.
        return (None, None) if self.exchange.size == 1 else self.ops.by_expert(self.counts, sum(self.splits.received))

    @property
    def arrange(self) -> Tensor | None:
        """[received]: the rows that arrived in the order of the experts; None: they have it."""
        return self._orders[0]

    @property
    def restore(self) -> Tensor | None:
        """The inverse of `arrange`."""
        return self._orders[1]


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
        # The fewer bits, the fewer passes of a radix sort.
        flat = experts.to(torch.int16 if number < 2**15 else torch.int64)
        self._of = (flat if kept is None else torch.where(kept, flat, number)).reshape(-1)
        keys, self._order = torch.sort(self._of, stable=True)
        place = torch.empty_like(self._order).scatter_(0, self._order, torch.arange(n * k, device=experts.device))
        self.places = place.view(1, n, k)
        """`back` of the plan where it is known with `rows`."""
        self.crossing = None if axes.exchange.size == 1 else Crossing.of(self._holders().view(n, k), axes)
        ends = torch.searchsorted(keys, torch.arange(number, dtype=keys.dtype, device=keys.device), right=True)
        self._counts = torch.diff(ends, prepend=ends.new_zeros(1))
        self._asked: Work = Done()
        self._read: Callable[[], list[Any]] | None = None
        beside.follows(Stream.current(experts.device))

    @property
    def rows(self) -> Tensor | None:
        """Those of the plan, where they are known before the host has read anything."""
        return self._order if self.axes.etp.size == 1 and not self.dropped else None

    @property
    def leaving(self) -> tuple[Tensor, Tensor] | None:
        """That of the plan, where it is known before the host has read anything."""
        if self.crossing is not None:
            return self.crossing.order, self.crossing.back
        return None if self.rows is None else (self.rows, self.places)

    def ask(self) -> None:
        """All ranks of the exchange tell each other how many rows come, which are on their way to the host then. What
        follows from that on the device alone is computed now: it must not wait for the host as well."""
        axes, exchange = self.axes, self.axes.exchange
        if exchange.size == 1:
            self._here, self._read = self._counts[None], to_host(self._counts[None])
            self._ends = _ends(self._here)
            return
        with self.beside.used():
            of_ep_ranks = self._counts.view(-1, self.number // axes.ep.size)
            of_each = torch.stack([of_ep_ranks[ep] for ep, _ in axes.places])  # [ranks, local experts]
            assert self.crossing is not None
            to_each = torch.cat([of_each, self.crossing.number[:, None]], 1)  # rows of each expert, and tokens
            every = all_gather_async(to_each, exchange).wait().view(exchange.size, *to_each.shape)
            own = every[:, exchange.rank]
            # Who reads of another must know what lies before.
            self._read = to_host(torch.cat([to_each, own]) if exchange.peer_buffer is None else every)
            self._here = own[:, :-1].contiguous()
            self._ends = _ends(self._here)
            coming = every[: exchange.rank, :, -1].sum(0)  # to each, from ranks before this one
            # One by one: a list of places would be a tensor of the host, for whose copy it waits.
            of_ep = torch.stack([coming[axes.places.index((ep, 0))] for ep in range(axes.ep.size)])
            before = of_ep.to(torch.int32).index_select(0, self._holders().clamp(max=axes.ep.size - 1))
            self._where = self.crossing.place + before
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
            rows, alone = order[:total], RowSplits([total], [total])
            of, leaving = Segments(read, self._ends), (rows, self.places)
            return Plan(exchange, leaving, rows, self.places, alone, self._here, None, of, self.ops)
        assert self.crossing is not None
        sizes = read()  # the one wait of the host
        if exchange.peer_buffer is None:
            sent, theirs = sizes[: exchange.size], sizes[exchange.size :]
            splits = [RowSplits([of(each) for each in sent], [of(each) for each in theirs]) for of in (_rows, _tokens)]
        else:
            theirs, me = [of[exchange.rank] for of in sizes], exchange.rank
            splits = [RowSplits.of_pairs([[of(to) for to in each] for each in sizes], me) for of in (_rows, _tokens)]
        of_rows, of_tokens = splits
        rows, back = order, self.places
        if self.rows is None:
            with self.beside.used():  # where the places of their tokens leave, and may be early
                rows, back = self._of_ranks(of_rows.sent)
                self._where = self._where.index_select(0, rows)
                self._asked = self.beside.launched()
            rows, back = map(self.beside.hand_over, (rows, back))
        self._asked.wait()
        here, ends, where = map(self.beside.hand_over, (self._here, self._ends, self._where))
        counts, leaving = [each[:-1] for each in theirs], (self.crossing.order, self.crossing.back)
        tokens, segments = Tokens(of_tokens, where[:, None]), Segments(lambda: counts, ends)
        return Plan(exchange, leaving, rows, back, of_rows, here, tokens, segments, self.ops)

    def _holders(self) -> Tensor:
        """[n * K]: as `Crossing.of` wants them."""
        return (self._of // (self.number // self.axes.ep.size)).long()

    def _of_ranks(self, sent: Sequence[int]) -> tuple[Tensor, Tensor]:
        """`rows` and `back` where a row goes to several ranks, or to none."""
        axes = self.axes
        # Where the rows of each ep coordinate begin in the sorted order, and those of each rank among what is sent.
        of_ep = {ep: total for (ep, _), total in zip(axes.places, sent, strict=True)}
        first = dict(zip(sorted(of_ep), accumulate((of_ep[ep] for ep in sorted(of_ep)), initial=0), strict=False))
        begins = list(accumulate(sent, initial=0))
        parts = [self._order[first[ep] : first[ep] + n] for (ep, _), n in zip(axes.places, sent, strict=True)]
        shift = torch.zeros((axes.etp.size, axes.ep.size + 1), dtype=torch.int64)
        for begin, (ep, etp) in zip(begins, axes.places, strict=False):
            shift[etp, ep] = begin - first[ep]
        back = self.places.flatten() + shift.to(self._of.device)[:, self._holders()]
        if self.dropped:
            back = torch.where(self._of < self.number, back, begins[-1])
        return torch.cat(parts), back.view(axes.etp.size, *self.places.shape[1:])


def _ends(counts: Tensor) -> Tensor:
    """[experts] int32: where the rows of each end, of `counts` [sources, experts]."""
    return counts.sum(0).cumsum(0).to(torch.int32)


def _rows(told: Sequence[int]) -> int:
    """Of what one rank tells another."""
    return sum(told[:-1])


def _tokens(told: Sequence[int]) -> int:
    return told[-1]


def moved(rows: Tensor, order: Tensor | None) -> Tensor:
    """Rows in another order; None: they have it."""
    return rows if order is None else rows.index_select(0, order)
