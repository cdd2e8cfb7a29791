"""Tokens to the ranks that hold their experts, and back: uneven all-to-alls in token order.

Each assignment (token t, slot k) is a row. A rank sends its rows sorted by expert, within one by assignment, so by
token; what arrives is arranged by expert, within one by source. No row lies beyond the last one: nothing is padded. An
expert that is cut over etp has its rows on all of its ranks, and what these give back are parts of a sum. The
sum over slots, and over these parts, is in fp32 or wider and in the order of the slots: the same for every ep.

The sizes of an uneven all-to-all are needed on the host, so it waits for the device once a layer, in the forward.
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
from stretto.tensor_parallel import Lazy, Pointwise
from stretto.world import AsyncTensor, Axis, ExpertAxes


@dataclass(frozen=True, eq=False)
class Plan:
    """Which rows go where. Tensors are on the device, sizes on the host.

    `rows` [sent]: the assignment t * K + k of each row that is sent. `back` [etp, n, K]: where in the rows that come
    back each assignment's are; `sent` itself, one beyond them, where it was dropped. `arrange` [received]: the rows
    that arrived in the order of the experts; `restore` is its inverse.
    """

    exchange: Axis
    rows: Tensor
    back: Tensor
    sent: list[int]
    received: list[int]
    arrange: Tensor
    restore: Tensor
    segments: Segments


@dataclass
class Transfer:
    """Rows on their way, in the forward and in the backward."""

    forward: AsyncTensor | None = None
    backward: AsyncTensor | None = None


def plan_of(experts: Tensor, number: int, axes: ExpertAxes, kept: Tensor | None = None) -> Plan:
    """How the assignments `experts` [n, K] of this rank's tokens go to the holders of `number` experts.

    `kept` [n, K] says which are not dropped. All ranks of the exchange call it together; the host waits once.
    """
    exchange, (n, k) = axes.exchange, experts.shape
    local = number // axes.ep.size
    flat = experts.reshape(-1) if kept is None else torch.where(kept, experts, number).reshape(-1)
    keys, order = torch.sort(flat, stable=True)
    counts = torch.bincount(keys, minlength=number + 1)[:number]
    of_ep_ranks = counts.view(-1, local)
    to_each = torch.stack([of_ep_ranks[ep] for ep, _ in axes.places])  # [ranks, local experts]
    if exchange.size == 1:
        from_each = to_each
    else:
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
    place = torch.empty_like(order)
    place[order] = torch.arange(n * k, device=order.device)
    back = place + shift.to(order.device)[:, flat // local]
    if kept is not None:
        back = torch.where(flat < number, back, begins[-1])
    arrange = _by_expert(from_each, sum(received))
    restore = torch.empty_like(arrange)
    restore[arrange] = torch.arange(len(arrange), device=arrange.device)
    per_expert = tuple(tuple(source[e] for source in here) for e in range(local))
    ends = from_each.sum(0).cumsum(0).to(torch.int32)
    return Plan(
        exchange,
        torch.cat(parts) if len(parts) > 1 else parts[0],
        back.view(-1, n, k),
        sent,
        received,
        arrange,
        restore,
        Segments(per_expert, ends),
    )


def _by_expert(counts: Tensor, total: int) -> Tensor:
    """Rows that lie by source, within it by expert, as `counts` [sources, experts] says: their order by expert."""
    begins = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts).t().flatten()
    lengths = counts.t().flatten()
    ahead = lengths.cumsum(0) - lengths
    moved = torch.repeat_interleave(begins - ahead, lengths, output_size=total)
    return moved + torch.arange(total, device=counts.device)


def send(x: Tensor, plan: Plan, transfer: Transfer) -> Tensor:
    """Tokens x [n, h] begin their way; what is returned has no values until `receive`."""
    return _Send.apply(x, plan, transfer)  # type: ignore[no-any-return, no-untyped-call]


def receive(coming: Tensor, plan: Plan, transfer: Transfer, flush: Callable[[], object]) -> Tensor:
    """What arrived [m, h], arranged by expert. `flush` is called while the gradient is on its way."""
    return _Receive.apply(coming, plan, transfer, flush)  # type: ignore[no-any-return, no-untyped-call]


def regathered(x: Tensor, plan: Plan) -> Lazy:
    """What arrives where no rank exchanges with another, for a product that takes it from x [n, h] forward and again in
    the backward: it is never kept."""
    slots = plan.back.shape[-1]
    order = (plan.rows // slots).index_select(0, plan.arrange)

    def forward(x: Tensor) -> Tensor:
        return x.index_select(0, order)

    def backward(dy: Tensor, x: Tensor) -> tuple[Tensor]:
        del x
        return (gathered_slots(dy.index_select(0, plan.restore), plan.back, None),)

    def both(dy: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return forward(x), *backward(dy, x)

    return Lazy(Pointwise(forward, backward, both, recompute=True), (x,))


class _Send(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan, transfer: Transfer) -> Tensor:
        ctx.plan, ctx.transfer, ctx.slots = plan, transfer, plan.back.shape[-1]
        rows = x.index_select(0, plan.rows // ctx.slots)
        transfer.forward = all_to_all_rows_async(rows, plan.sent, plan.received, plan.exchange)
        return transfer.forward.tensor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None]:
        rows, ctx.transfer.backward = ctx.transfer.backward.wait(), None
        return gathered_slots(rows, ctx.plan.back, None), None, None


class _Receive(Function):
    @staticmethod
    def forward(ctx: Any, coming: Tensor, plan: Plan, transfer: Transfer, flush: Callable[[], object]) -> Tensor:
        del coming
        ctx.plan, ctx.transfer, ctx.flush = plan, transfer, flush
        assert transfer.forward is not None
        got, transfer.forward = transfer.forward.wait(), None
        return got.index_select(0, plan.arrange)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        plan = ctx.plan
        rows = dy.index_select(0, plan.restore)
        ctx.transfer.backward = all_to_all_rows_async(rows, plan.received, plan.sent, plan.exchange)
        if plan.exchange.size > 1:
            ctx.flush()
        return rows, None, None, None


def gathered_slots(rows: Tensor, back: Tensor, weights: Tensor | None) -> Tensor:
    """[n, h]: the sum of each token's rows, times `weights` where there are any, in the order of its slots."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = torch.zeros((back.shape[1], rows.shape[1]), dtype=wide, device=rows.device)
    for k in range(back.shape[-1]):
        found = slot(rows, back, k, wide)
        total += found if weights is None else found * weights[:, k, None]
    return total.to(rows.dtype)


def slot(rows: Tensor, back: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """[n, h]: what came back for slot k of each token, the parts of a cut expert added up; 0 where it was dropped."""
    found = torch.zeros((back.shape[1], rows.shape[1]), dtype=dtype, device=rows.device)
    for part in back[:, :, k]:
        if len(rows):
            here = part < len(rows)
            found += torch.where(here[:, None], rows.index_select(0, part.clamp(max=len(rows) - 1)), 0)
    return found
