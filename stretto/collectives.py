"""Collectives on plain tensors: pure, differentiable, named by their axis.

Every function returns a new tensor, leaves its input alone, takes any strides, and is an exact no-op (it
returns its input) over an axis of size 1. The backward of each is its exact transpose, the loss being the
sum over the ranks of what each computes:

    all_reduce <-> all_reduce      all_gather <-> reduce_scatter      all_to_all <-> all_to_all, turned round

Where every rank of an axis holds the *same* loss (tensor parallelism), the pairs are others: see
`stretto.tensor_parallel.mappings`. The functions with a trailing underscore work in place, carry no gradient and
return a `Work`: they are for buckets and other storage that the caller owns.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from stretto.world import Axis

# torch 2.13 renamed these two and warns of the names that torch 2.11 has.
_all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Work(Protocol):
    """A collective on its way. `wait` orders what follows after it (on CUDA: on the stream, not the host)."""

    def wait(self) -> Any: ...


class Done:
    """The work of a collective over one rank."""

    def wait(self) -> None:
        """Return at once."""


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """Sum of `x` over the axis. [*] -> [*]."""
    return x if axis.size == 1 else _AllReduce.apply(x, axis)  # type: ignore[no-untyped-call]


def all_gather(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Concatenation of every rank's `x` along `dim`, in the order of the axis. [.., n, ..] -> [.., n*size, ..]."""
    return x if axis.size == 1 else _AllGather.apply(x, axis, dim)  # type: ignore[no-untyped-call]


def reduce_scatter(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """This rank's chunk along `dim` of the sum over the axis. [.., n*size, ..] -> [.., n, ..].

    Raises ValueError if `dim` does not divide by the size of the axis.
    """
    return x if axis.size == 1 else _ReduceScatter.apply(x, axis, dim)  # type: ignore[no-untyped-call]


def all_to_all(x: Tensor, axis: Axis, split_dim: int, concat_dim: int) -> Tensor:
    """Chunk i along `split_dim` goes to rank i; what arrives is concatenated along `concat_dim`.

    Raises ValueError if `split_dim` does not divide by the size of the axis.
    """
    return x if axis.size == 1 else _AllToAll.apply(x, axis, split_dim, concat_dim)  # type: ignore[no-untyped-call]


def max_reduce(x: Tensor, axis: Axis) -> Tensor:
    """Elementwise maximum over the axis; carries no gradient (the softmax's shift has none)."""
    if axis.size == 1:
        return x.detach()
    out = x.detach().clone(memory_format=torch.contiguous_format)
    _tell(axis, "max_reduce", out)
    dist.all_reduce(out, dist.ReduceOp.MAX, group=axis.group)
    return out


def broadcast(x: Tensor, axis: Axis, src: int = 0) -> Tensor:
    """The `x` of position `src` on the axis, on every rank; carries no gradient."""
    if axis.size == 1:
        return x.detach()
    out = x.detach().clone(memory_format=torch.contiguous_format)
    _tell(axis, f"broadcast from {src}", out)
    dist.broadcast(out, group=axis.group, group_src=src)
    return out


def all_reduce_(x: Tensor, axis: Axis) -> Work:
    """Sum contiguous `x` over the axis in place; returns at once."""
    if axis.size == 1:
        return Done()
    _tell(axis, "all_reduce", x)
    work: Work = dist.all_reduce(x, group=axis.group, async_op=True)
    return work


def _tell(axis: Axis, op: str, x: Tensor) -> None:
    """Every collective passes here, right before it is issued."""
    if axis.watch is not None:
        axis.watch(axis, op, x)


def _divided(x: Tensor, axis: Axis, dim: int, op: str) -> int:
    n = x.shape[dim]
    if n % axis.size:
        raise ValueError(f"{op} over {axis}: dimension {dim} of {tuple(x.shape)} is {n}, not a multiple of {axis.size}")
    return n // axis.size


class _AllReduce(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis  # type: ignore[attr-defined]
        out = x.clone(memory_format=torch.contiguous_format)
        _tell(axis, "all_reduce", out)
        dist.all_reduce(out, group=axis.group)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return all_reduce(dy, ctx.axis), None


class _AllGather(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim  # type: ignore[attr-defined]
        x = x.movedim(dim, 0).contiguous()
        out = x.new_empty((axis.size * x.shape[0], *x.shape[1:]))
        _tell(axis, "all_gather", x)
        _all_gather_single(out, x, group=axis.group)
        return out.movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter(dy, ctx.axis, ctx.dim), None, None


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim  # type: ignore[attr-defined]
        n = _divided(x, axis, dim, "reduce_scatter")
        x = x.movedim(dim, 0).contiguous()
        out = x.new_empty((n, *x.shape[1:]))
        _tell(axis, "reduce_scatter", x)
        _reduce_scatter_single(out, x, group=axis.group)
        return out.movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(dy, ctx.axis, ctx.dim), None, None


class _AllToAll(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, axis: Axis, split_dim: int, concat_dim: int) -> Tensor:
        ctx.axis, ctx.dims = axis, (split_dim, concat_dim)  # type: ignore[attr-defined]
        _divided(x, axis, split_dim, "all_to_all")
        sent = torch.stack(x.chunk(axis.size, split_dim))
        got = torch.empty_like(sent)
        _tell(axis, "all_to_all", sent)
        dist.all_to_all_single(got, sent, group=axis.group)
        return torch.cat(got.unbind(), concat_dim)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        split_dim, concat_dim = ctx.dims
        return all_to_all(dy, ctx.axis, concat_dim, split_dim), None, None, None
