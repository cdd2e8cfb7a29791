"""The scores of a router: x W^T with fp32 sums and an fp32 result, or wider: of bf16 factors no bit is lost.

Neither is one in the backward, whose gradient dy is in fp32. On a GPU it is split into three bf16 parts, eight bits of
its 24 in each, that stand side by side as one factor: so x, the largest tensor there, is read as it lies, and tensor
cores do the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from stretto.tensor_parallel import Build
from stretto.tensor_parallel.linear import accumulate_matmul

Split = Callable[[Tensor], Tensor]
Write = Callable[[Tensor, bool], None]


def scores(x: Tensor, weight: nn.Parameter, build: Build, split: Split) -> Tensor:
    """x [n, h], W [E, h] -> [n, E]; `split` is `three_parts` as a build wants it computed."""
    return _Scores.apply(x, weight, build, split)  # type: ignore[no-any-return, no-untyped-call]


def three_parts(x: Tensor) -> Tensor:
    """fp32 [n, E] -> bf16 [n, 3E] whose thirds add up to x. Bits are cut off, not rounded: a compiler may take a
    number that is rounded and widened for the number itself."""
    high = _cut(x)
    middle = _cut(x - high)
    return torch.cat([high, middle, x - high - middle], -1).to(torch.bfloat16)


def _cut(x: Tensor) -> Tensor:
    return (x.view(torch.int32) & -(2**16)).view(torch.float32)


def plainly(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Write]:
    """dx, and how to add dW up, in the dtype of dy [n, E]."""

    def write(total: Tensor, first_microbatch: bool) -> None:
        accumulate_matmul(total, first_microbatch, dy.to(total.dtype), x.to(total.dtype))

    return (dy @ weight.to(dy.dtype)).to(x.dtype), write


def by_parts(dy: Tensor, x: Tensor, weight: Tensor, split: Split) -> tuple[Tensor, Write]:
    """The same of x and weight in bf16, by GEMMs of theirs with fp32 sums."""
    parts = split(dy)

    def write(total: Tensor, first_microbatch: bool) -> None:
        wide = torch.promote_types(total.dtype, torch.float32)
        each = torch.empty((3, *total.shape), dtype=wide, device=total.device)
        accumulate_matmul(each.view(-1, x.shape[1]), True, parts, x)
        if first_microbatch:
            total.copy_(each.sum(0))
        else:
            total += each.sum(0)

    return parts @ weight.repeat(3, 1), write


class _Scores(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, build: Build, split: Split) -> Tensor:
        ctx.param, ctx.build, ctx.split = weight, build, split
        ctx.save_for_backward(x, weight)
        wide = torch.promote_types(x.dtype, torch.float32)
        if x.is_cuda and x.dtype != wide:
            product: Tensor = torch.ops.aten.mm.dtype(x, weight.t(), wide)
            return product
        return x.to(wide) @ weight.detach().to(wide).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, build = ctx.saved_tensors[0], ctx.build
        if x.is_cuda and x.dtype == torch.bfloat16:
            dx, write = by_parts(dy, x, ctx.param.detach(), ctx.split)
        else:
            dx, write = plainly(dy, x, ctx.param.detach())
        if build.accumulators is None:
            dw = torch.empty_like(ctx.param)
            write(dw, True)
            return dx, dw, None, None
        build.accumulators.add(ctx.param, write)
        return dx, None, None, None
