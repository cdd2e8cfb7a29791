"""Collectives on plain tensors: pure, differentiable, named by their axis.

Every function returns a new tensor, leaves its input alone, takes any strides, and is an exact no-op (it
returns its input) over an axis of size 1. The backward of each is its exact transpose, the loss being the
sum over the ranks of what each computes:

    all_reduce <-> all_reduce      all_gather <-> reduce_scatter      all_to_all <-> all_to_all, turned round

Where every rank of an axis holds the *same* loss (tensor parallelism), the pairs are others: see
`stretto.tensor_parallel.mappings`. The functions with a trailing underscore work in place, carry no gradient and
return a `Work`: they are for buckets and other storage that the caller owns. Those that `begin` carry none either, and
return at once what is `AsyncTensor`: who has something else to do does it before taking that. The differentiable ones
call `overlap_with` while they are in flight, forward and backward.

What goes over an axis with a peer buffer goes through that where it may, and sums over an `ordered` axis are those of a
tree, done when the call returns; to the caller they are the same operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from stretto.ordered import all_gather_single, ordered_all_reduce_, ordered_reduce_scatter, reduce_scatter_single
from stretto.world import AsyncTensor, Axis, Done, Rows, RowSplits, Several, Then, Work

OverlapWith = Callable[[], object]


def nothing() -> None:
    """What is done while a collective is in flight, by who has nothing else to do."""


def all_reduce(x: Tensor, axis: Axis, overlap_with: OverlapWith = nothing) -> Tensor:
    """Sum of `x` over the axis. [*] -> [*]."""
    return x if axis.size == 1 else _AllReduce.apply(x, axis, overlap_with)  # type: ignore[no-untyped-call]


def all_gather(x: Tensor, axis: Axis, dim: int = 0, overlap_with: OverlapWith = nothing) -> Tensor:
    """Concatenation of every rank's `x` along `dim`, in the order of the axis. [.., n, ..] -> [.., n*size, ..]."""
    return x if axis.size == 1 else _AllGather.apply(x, axis, dim, overlap_with)  # type: ignore[no-untyped-call]


def reduce_scatter(x: Tensor, axis: Axis, dim: int = 0, overlap_with: OverlapWith = nothing) -> Tensor:
    """This rank's chunk along `dim` of the sum over the axis. [.., n*size, ..] -> [.., n, ..].

    Raises ValueError if `dim` does not divide by the size of the axis.
    """
    return x if axis.size == 1 else _ReduceScatter.apply(x, axis, dim, overlap_with)  # type: ignore[no-untyped-call]


def all_to_all(x: Tensor, axis: Axis, split_dim: int, concat_dim: int) -> Tensor:
    """Chunk i along `split_dim` goes to rank i; what arrives is concatenated along `concat_dim`.

    Raises ValueError if `split_dim` does not divide by the size of the axis.
    """
    return x if axis.size == 1 else _AllToAll.apply(x, axis, split_dim, concat_dim)  # type: ignore[no-untyped-call]


def all_to_all_into(out: Tensor, x: Tensor, axis: Axis) -> Work:
    """Part i of contiguous `x` [n * size] goes to rank i, what comes stands in `out` in rank order; returns at once."""
    axis.tell("all_to_all", x)
    return axis.timed(dist.all_to_all_single(out, x, group=axis.group, async_op=True))


def all_to_all_parts(parts: Sequence[Tensor], sizes: Sequence[int], axis: Axis) -> list[Tensor]:
    """`parts[i]` [*] goes to rank i; from each rank come `sizes[i]` elements. Carries no gradient."""
    if axis.size == 1:
        return [part.detach() for part in parts]
    sent = torch.cat([part.detach() for part in parts])
    got = sent.new_empty(sum(sizes))
    lengths = [len(part) for part in parts]
    axis.tell("all_to_all_rows", sent[lengths[axis.rank] :])  # as many as leave
    axis.timed(dist.all_to_all_single(got, sent, list(sizes), lengths, group=axis.group, async_op=True)).wait()
    return list(torch.split(got, list(sizes)))


def all_reduce_max(x: Tensor, axis: Axis) -> Tensor:
    """Elementwise maximum over the axis; carries no gradient (the softmax's shift has none)."""
    if axis.size == 1:
        return x.detach()
    out = x.detach().clone(memory_format=torch.contiguous_format)
    axis.tell("all_reduce_max", out)
    axis.timed(dist.all_reduce(out, dist.ReduceOp.MAX, group=axis.group, async_op=True)).wait()
    return out


def broadcast(x: Tensor, axis: Axis, src: int = 0) -> Tensor:
    """The `x` of position `src` on the axis, on every rank; carries no gradient."""
    if axis.size == 1:
        return x.detach()
    out = x.detach().clone(memory_format=torch.contiguous_format)
    axis.tell(f"broadcast from {src}", out)
    axis.timed(dist.broadcast(out, group=axis.group, group_src=src, async_op=True)).wait()
    return out


def all_reduce_(x: Tensor, axis: Axis) -> Work:
    """Sum contiguous `x` over the axis in place; returns at once."""
    if axis.size == 1:
        return Done()
    if axis.ordered:
        ordered_all_reduce_(x, axis)
        return Done()
    axis.tell("all_reduce", x)
    return axis.timed(dist.all_reduce(x, group=axis.group, async_op=True))


def all_gather_into(out: Tensor, x: Tensor, axis: Axis) -> Work:
    """Every rank's contiguous `x` [n] one after another in `out` [n * size]; returns at once.

    `x` may be this rank's own part of `out`, and then nothing is copied.
    """
    if axis.size == 1:
        if out.data_ptr() != x.data_ptr():
            out.copy_(x)
        return Done()
    axis.tell("all_gather", x)
    if axis.peer_memory is not None and axis.peer_memory.holds(x):
        return axis.peer_memory.gather_into(out, x)
    work: Work = all_gather_single(out, x, group=axis.group, async_op=True)
    return work


def reduce_scatter_into(out: Tensor, x: Tensor, axis: Axis, *, add: bool = False) -> Work:
    """This rank's part of the sum of contiguous `x` [n * size] in `out` [n], or added to it; returns at once.

    `out` may be this rank's part of `x`, if nothing is added. What is in `x` is undefined then.
    """
    if axis.size == 1:
        if add:
            out.add_(x)
        elif out.data_ptr() != x.data_ptr():
            out.copy_(x)
        return Done()
    if axis.ordered:
        part = ordered_reduce_scatter(x, axis)
        out.add_(part) if add else out.copy_(part)
        return Done()
    axis.tell("reduce_scatter", x)
    if axis.peer_memory is not None and axis.peer_memory.holds(x):
        return axis.peer_memory.sum_into(out, x, add=add)
    into = x[axis.rank * out.numel() : (axis.rank + 1) * out.numel()] if add else out
    work: Work = reduce_scatter_single(into, x, group=axis.group, async_op=True)
    return Then(work, lambda: out.add_(into)) if add else work


def all_gather_async(x: Tensor, axis: Axis) -> AsyncTensor:
    """`all_gather` along dim 0, begun."""
    if axis.size == 1:
        return AsyncTensor(x)
    x = x.detach().contiguous()
    axis.tell("all_gather", x)
    if axis.peer_buffer is not None and axis.peer_buffer.takes(x.nbytes):
        return axis.peer_buffer.gather(x)
    out = x.new_empty((axis.size * x.shape[0], *x.shape[1:]))
    return AsyncTensor(out, axis.timed(all_gather_single(out, x, group=axis.group, async_op=True)))


def reduce_scatter_async(x: Tensor, axis: Axis) -> AsyncTensor:
    """`reduce_scatter` along dim 0, begun. Raises ValueError if that does not divide by the size of the axis."""
    if axis.size == 1:
        return AsyncTensor(x)
    n = _divided(x, axis, 0, "reduce_scatter")
    x = x.detach().contiguous()
    if axis.ordered:
        return AsyncTensor(ordered_reduce_scatter(x, axis))
    if axis.peer_buffer is not None and axis.peer_buffer.takes(x.nbytes // axis.size):
        parts = x.chunk(axis.size)
        return reduce_scatter_rows_async(lambda to, out: parts[to] if out is None else out.copy_(parts[to]), x, axis)
    axis.tell("reduce_scatter", x)
    out = x.new_empty((n, *x.shape[1:]))
    return AsyncTensor(out, axis.timed(reduce_scatter_single(out, x, group=axis.group, async_op=True)))


def shift_async(x: Tensor, axis: Axis) -> AsyncTensor:
    """What the rank before this one on the axis has, as the first has what the last has; each passes `x` on, begun."""
    if axis.size == 1:
        return AsyncTensor(x)
    x = x.detach().contiguous()
    axis.tell("shift", x)
    out = torch.empty_like(x)
    ends = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, x, group=axis.group, group_peer=ends[0]),
            dist.P2POp(dist.irecv, out, group=axis.group, group_peer=ends[1]),
        ]
    )
    return AsyncTensor(out, axis.timed(Several(works)))


def reduce_scatter_rows_async(rows: Rows, like: Tensor, axis: Axis) -> AsyncTensor:
    """`reduce_scatter_async` of a tensor as `like`, of which `rows` gives each rank's part when that can leave.

    Raises ValueError where there is no peer buffer: nothing would leave before all is there.
    """
    if axis.peer_buffer is None:
        raise ValueError(f"{axis} has no peer buffer to send a sum through in parts")
    axis.tell("reduce_scatter", like)
    return axis.peer_buffer.scatter(rows, like[: _divided(like, axis, 0, "reduce_scatter")])


def all_to_all_rows_async(x: Tensor, splits: RowSplits, axis: Axis, order: Tensor | None = None) -> AsyncTensor:
    """Rows of x [sum of sent, ..] to the ranks of an axis, so many to each, begun; what comes is in their order.

    With `order` [sum of sent] they are those of `x[order]`, of any number of rows. Ranks may send and get nothing.
    Observers see the rows that leave this rank: how many differs from rank to rank.
    """
    if axis.size == 1:
        return AsyncTensor(x if order is None else x.index_select(0, order))
    x = x.detach().contiguous()
    axis.tell("all_to_all_rows", x[:1].expand(sum(splits.sent) - splits.sent[axis.rank], *x.shape[1:]))
    if axis.peer_buffer is not None and splits.pairs is not None:
        most = splits.leaving * x.element_size() * prod(x.shape[1:])
        if axis.peer_buffer.takes(-(-most // (axis.size - 1))):
            return axis.peer_buffer.exchange(x, splits.pairs, order)
    if order is not None:
        x = x.index_select(0, order)
    out = x.new_empty((sum(splits.received), *x.shape[1:]))
    work = dist.all_to_all_single(out, x, list(splits.received), list(splits.sent), group=axis.group, async_op=True)
    return AsyncTensor(out, axis.timed(work))


def _divided(x: Tensor, axis: Axis, dim: int, op: str) -> int:
    n = x.shape[dim]
    if n % axis.size:
        raise ValueError(f"{op} over {axis}: dimension {dim} of {tuple(x.shape)} is {n}, not a multiple of {axis.size}")
    return n // axis.size


class _AllReduce(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, overlap_with: OverlapWith) -> Tensor:
        ctx.axis, ctx.overlap_with = axis, overlap_with
        out = x.clone(memory_format=torch.contiguous_format)
        work = all_reduce_(out, axis)
        overlap_with()
        work.wait()
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return all_reduce(dy, ctx.axis, ctx.overlap_with), None, None


class _AllGather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int, overlap_with: OverlapWith) -> Tensor:
        ctx.axis, ctx.dim, ctx.overlap_with = axis, dim, overlap_with
        whole = all_gather_async(x.movedim(dim, 0), axis)
        overlap_with()
        return whole.wait().movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return reduce_scatter(dy, ctx.axis, ctx.dim, ctx.overlap_with), None, None, None


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int, overlap_with: OverlapWith) -> Tensor:
        ctx.axis, ctx.dim, ctx.overlap_with = axis, dim, overlap_with
        _divided(x, axis, dim, "reduce_scatter")
        part = reduce_scatter_async(x.movedim(dim, 0), axis)
        overlap_with()
        return part.wait().movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return all_gather(dy, ctx.axis, ctx.dim, ctx.overlap_with), None, None, None


class _AllToAll(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, axis: Axis, split_dim: int, concat_dim: int) -> Tensor:
        ctx.axis, ctx.dims = axis, (split_dim, concat_dim)  # type: ignore[attr-defined]
        _divided(x, axis, split_dim, "all_to_all")
        sent = torch.stack(x.chunk(axis.size, split_dim))
        got = torch.empty_like(sent)
        axis.tell("all_to_all", sent)
        axis.timed(dist.all_to_all_single(got, sent, group=axis.group, async_op=True)).wait()
        return torch.cat(got.unbind(), concat_dim)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        split_dim, concat_dim = ctx.dims
        return all_to_all(dy, ctx.axis, concat_dim, split_dim), None, None, None
