"""Tokens that every tensor-parallel rank holds, shared among them, and back.

Without sequence parallelism the ranks of tp have the same tokens; each sends its share of them to the experts. The
ranks repeat one loss, so the two are each other's adjoint, as in `tensor_parallel.mappings`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from stretto.collectives import all_gather_async
from stretto.world import Axis


def share(x: Tensor, tp: Axis) -> Tensor:
    """This rank's rows of x [n, h], ceil(n/t) of them or what is left; the backward gathers."""
    return x if tp.size == 1 else _Share.apply(x, tp)  # type: ignore[no-untyped-call]


def unshare(x: Tensor, tp: Axis, n: int) -> Tensor:
    """All n rows of all ranks; the backward takes this rank's."""
    return x if tp.size == 1 else _Unshare.apply(x, tp, n)  # type: ignore[no-untyped-call]


def gathered(x: Tensor, tp: Axis, n: int) -> Tensor:
    """The n rows of which each rank has its share."""
    if tp.size == 1:
        return x
    chunk = -(-n // tp.size)
    padded = x if x.shape[0] == chunk else torch.cat([x, x.new_zeros((chunk - x.shape[0], *x.shape[1:]))])
    return all_gather_async(padded, tp).wait()[:n]


def mine(n: int, tp: Axis) -> slice:
    """Which of n rows are this rank's."""
    chunk = -(-n // tp.size)
    return slice(min(n, tp.rank * chunk), min(n, (tp.rank + 1) * chunk))


class _Share(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Axis) -> Tensor:
        ctx.tp, ctx.n = tp, x.shape[0]
        return x[mine(ctx.n, tp)].clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return unshare(dy, ctx.tp, ctx.n), None


class _Unshare(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Axis, n: int) -> Tensor:
        ctx.tp = tp
        return gathered(x, tp, n).clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return share(dy, ctx.tp), None, None
