"""Collectives with their adjoints for tensor parallelism, where every rank of the axis holds the same loss.

The ranks do not add their losses up, they repeat one; so the adjoint of a sum whose result all of them use alike is
the identity, and what enters a region that each computes a part of collects its gradient by a sum (Shoeybi et al.,
"Megatron-LM", 2019, functions f and g). Under sequence parallelism the same two borders gather and scatter the
sequence instead (Korthikanti et al., "Reducing activation recomputation", 2022, functions g and g-bar). The way out
is the backward of the way in, and the other way round, to any order of derivative.

    enter the parallel region    copy_to          [s, b, h]   -> [s, b, h]    identity;       backward: reduce_from
                                 gather_sequence  [s/t, b, h] -> [s, b, h]    all-gather;     backward: scatter_sequence
    leave it                     reduce_from      [s, b, h]   -> [s, b, h]    all-reduce;     backward: copy_to
                                 scatter_sequence [s, b, h]   -> [s/t, b, h]  reduce-scatter; backward: gather_sequence

While any of them is under way, forward or backward, `overlap_with` is called: what it does takes no time of its own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from stretto.collectives import OverlapWith, all_gather, all_reduce, nothing, reduce_scatter
from stretto.world import Axis


def enter(x: Tensor, tp: Axis, *, sequence_parallel: bool, overlap_with: OverlapWith = nothing) -> Tensor:
    """Into the region where each tensor-parallel rank computes its part of the features."""
    if tp.size == 1:
        return x
    return gather_sequence(x, tp, overlap_with) if sequence_parallel else copy_to(x, tp, overlap_with)


def leave(x: Tensor, tp: Axis, *, sequence_parallel: bool, overlap_with: OverlapWith = nothing) -> Tensor:
    """Out of it: partial sums become the whole sum, or each rank's part of the sequence of it."""
    if tp.size == 1:
        return x
    return scatter_sequence(x, tp, overlap_with) if sequence_parallel else reduce_from(x, tp, overlap_with)


def copy_to(x: Tensor, tp: Axis, overlap_with: OverlapWith = nothing) -> Tensor:
    """Identity forward; backward sums the gradient over the axis."""
    return x if tp.size == 1 else _CopyTo.apply(x, tp, overlap_with)  # type: ignore[no-untyped-call]


def reduce_from(x: Tensor, tp: Axis, overlap_with: OverlapWith = nothing) -> Tensor:
    """Sum over the axis forward; identity backward."""
    return x if tp.size == 1 else _ReduceFrom.apply(x, tp, overlap_with)  # type: ignore[no-untyped-call]


def gather_sequence(x: Tensor, tp: Axis, overlap_with: OverlapWith = nothing) -> Tensor:
    """[s/t, b, h] -> [s, b, h]; each rank's use of the whole gives a part of the gradient, so it is summed."""
    return all_gather(x, tp, 0, overlap_with)


def scatter_sequence(x: Tensor, tp: Axis, overlap_with: OverlapWith = nothing) -> Tensor:
    """[s, b, h] of partial sums -> [s/t, b, h] of whole ones."""
    return reduce_scatter(x, tp, 0, overlap_with)


class _CopyTo(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Axis, overlap_with: OverlapWith) -> Tensor:
        ctx.tp, ctx.overlap_with = tp, overlap_with
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return reduce_from(dy, ctx.tp, ctx.overlap_with), None, None


class _ReduceFrom(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Axis, overlap_with: OverlapWith) -> Tensor:
        ctx.tp, ctx.overlap_with = tp, overlap_with
        return all_reduce(x, tp, overlap_with)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return copy_to(dy, ctx.tp, ctx.overlap_with), None, None
