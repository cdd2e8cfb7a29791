"""Tokens to the ranks that hold their experts, and back: uneven all-to-alls in token order.

Each assignment (token t, slot k) is a row. A rank sends its rows sorted by expert, within one by assignment, so by
token; what arrives is arranged by expert, within one by source. No row lies beyond the last one: nothing is padded. An
expert that is cut over etp has its rows on all of its ranks, and what these give back are parts of a sum. The
sum over slots, and over these parts, is in fp32 or wider and in the order of the slots: the same for every ep.

The sizes of an uneven all-to-all are needed on the host, so it waits for the device once a layer, in the forward. A
rank that exchanges nothing waits for none unless tokens are dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from stretto.collectives import all_to_all_rows_async
from stretto.experts.grouped import Segments
from stretto.experts.host import to_host
from stretto.experts.rows import RowOps
from stretto.tensor_parallel import Lazy, Pointwise
from stretto.world import AsyncTensor, Axis, ExpertAxes


@dataclass(frozen=True, eq=False)
class Plan:
    """Which rows go where. Tensors are on the device, sizes on the host.

    `rows` [sent]: the assignment t * K + k of each row that is sent. `back` [etp, n, K]: where in the rows that come
    back each assignment's are; beyond the last of them where it was dropped. `arrange` [received]: the rows that
    arrived in the order of the experts; `restore` is its inverse. On one rank rows have that order already: None.
    """

    exchange: Axis
    rows: Tensor
    back: Tensor
    sent: list[int]
    received: list[int]
    arrange: Tensor | None
    restore: Tensor | None
    segments: Segments


@dataclass
class Transfer:
    """Rows on their way, in the forward and in the backward."""

    forward: AsyncTensor | None = None
    backward: AsyncTensor | None = None


def plan_of(experts: Tensor, number: int, axes: ExpertAxes, kept: Tensor | None = None) -> Plan:
    """How the assignments `experts` [n, K] of this rank's tokens go to the holders of `number` experts.

    `kept` [n, K] says which are not dropped. All ranks of the exchange call it together.
    """
    exchange, (n, k) = axes.exchange, experts.shape
    # The fewer bits, the fewer passes of a radix sort.
    flat = experts.to(torch.int16 if number < 2**15 else torch.int64)
    flat = (flat if kept is None else torch.where(kept, flat, number)).reshape(-1)
    keys, order = torch.sort(flat, stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(n * k, device=order.device))
    ends = torch.searchsorted(keys, torch.arange(number, dtype=keys.dtype, device=keys.device), right=True)
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    if exchange.size == 1:
        return _alone(exchange, order, place.view(1, n, k), ends, counts, dropped=kept is not None)
    local = number // axes.ep.size
    of_ep_ranks = counts.view(-1, local)
    to_each = torch.stack([of_ep_ranks[ep] for ep, _ in axes.places])  # [ranks, local experts]
    ones = [1] * exchange.size
    from_each = all_to_all_rows_async(to_each, ones, ones, exchange).wait()
    sizes: list[list[int]] = torch.cat([to_each, from_each]).tolist()  # the one wait of the host
    there, here = sizes[: exchange.size], sizes[exchange.size :]
    sent, received = [sum(each) for each in there], [sum(each) for each in here]
    # Where the rows of each ep coordinate begin in the sorted order, and those of each rank among what is sent.
    of_ep = {ep: total for (ep, _), total in zip(axes.places, sent, strict=True)}
    first = dict(zip(sorted(of_ep), accumulate((of_ep[ep] for ep in sorted(of_ep)), initial=0), strict=False))
    begins = list(accumulate(sent, initial=0))
    parts = [order[first[ep] : first[ep] + total] for (ep, _), total in zip(axes.places, sent, strict=True)]
    shift = torch.zeros((axes.etp.size, axes.ep.size + 1), dtype=torch.int64)
    for begin, (ep, etp) in zip(begins, axes.places, strict=False):
        shift[etp, ep] = begin - first[ep]
    back = place + shift.to(order.device)[:, (flat // local).long()]
    if kept is not None:
        back = torch.where(flat < number, back, begins[-1])
    arrange = _by_expert(from_each, sum(received))
    restore = torch.empty_like(arrange)
    restore[arrange] = torch.arange(len(arrange), device=arrange.device)
    segments = Segments(lambda: here, from_each.sum(0).cumsum(0).to(torch.int32))
    return Plan(exchange, torch.cat(parts), back.view(axes.etp.size, n, k), sent, received, arrange, restore, segments)


def _alone(exchange: Axis, order: Tensor, back: Tensor, ends: Tensor, counts: Tensor, *, dropped: bool) -> Plan:
    """Of one rank, whose rows are by expert as they are sent. Those that were dropped are the last in `order`.

    Unless some were, the host knows how many rows there are, and waits for no device: the counts of each expert are on
    their way to it until it reads them.
    """
    read = to_host(counts[None])
    total = sum(read()[0]) if dropped else len(order)
    segments = Segments(read, ends.to(torch.int32))
    return Plan(exchange, order[:total], back, [total], [total], None, None, segments)


def _by_expert(counts: Tensor, total: int) -> Tensor:
    """Rows that lie by source, within it by expert, as `counts` [sources, experts] says: their order by expert."""
    begins = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts).t().flatten()
    lengths = counts.t().flatten()
    ahead = lengths.cumsum(0) - lengths
    moved = torch.repeat_interleave(begins - ahead, lengths, output_size=total)
    return moved + torch.arange(total, device=counts.device)


def send(x: Tensor, plan: Plan, transfer: Transfer, ops: RowOps) -> Tensor:
    """Tokens x [n, h] begin their way; what is returned has no values until `receive`."""
    return _Send.apply(x, plan, transfer, ops)  # type: ignore[no-any-return, no-untyped-call]


def receive(coming: Tensor, plan: Plan, transfer: Transfer, flush: Callable[[], object]) -> Tensor:
    """What arrived [m, h], arranged by expert. `flush` is called while the gradient is on its way."""
    return _Receive.apply(coming, plan, transfer, flush)  # type: ignore[no-any-return, no-untyped-call]


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


class _Send(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan, transfer: Transfer, ops: RowOps) -> Tensor:
        ctx.plan, ctx.transfer, ctx.ops = plan, transfer, ops
        rows = ops.scatter(x.detach(), plan.rows, plan.back)
        transfer.forward = all_to_all_rows_async(rows, plan.sent, plan.received, plan.exchange)
        return transfer.forward.tensor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None, None]:
        rows, ctx.transfer.backward = ctx.transfer.backward.wait(), None
        return ctx.ops.sum(rows, ctx.plan.back), None, None, None


class _Receive(Function):
    @staticmethod
    def forward(ctx: Any, coming: Tensor, plan: Plan, transfer: Transfer, flush: Callable[[], object]) -> Tensor:
        del coming
        ctx.plan, ctx.transfer, ctx.flush = plan, transfer, flush
        assert transfer.forward is not None
        got, transfer.forward = transfer.forward.wait(), None
        return moved(got.view_as(got), plan.arrange)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        plan = ctx.plan
        rows = moved(dy, plan.restore)
        ctx.transfer.backward = all_to_all_rows_async(rows, plan.received, plan.sent, plan.exchange)
        if plan.exchange.size > 1:
            ctx.flush()
        return rows, None, None, None


def moved(rows: Tensor, order: Tensor | None) -> Tensor:
    """Rows in another order; None: they have it."""
    return rows if order is None else rows.index_select(0, order)
