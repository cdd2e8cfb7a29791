"""The matrix product of the parallel layers, with its three products forward and back under our hand.

Beyond `F.linear` it can make its input itself (`Lazy`), and add the gradient of its weight up where it is wanted
(`Accumulators`), in the product that computes it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stretto.tensor_parallel.build import Accumulators, Build
from stretto.tensor_parallel.mappings import enter, leave
from stretto.tensor_parallel.pointwise import Lazy


def linear(
    x: Tensor | Lazy, weight: nn.Parameter, bias: Tensor | None, build: Build, *, entering: bool = False
) -> Tensor:
    """y = x W^T + b: x [.., d_in], W [d_out, d_in] -> [.., d_out].

    `entering` leads x into the tensor-parallel region first: it is gathered, or its gradient summed.
    """
    if isinstance(x, Lazy):
        return _Made.apply(x, weight, bias, build, entering, *x.inputs)  # type: ignore[no-any-return, no-untyped-call]
    if entering:
        x = enter(x, build.tp, sequence_parallel=build.sequence_parallel)
    if build.accumulators is None:
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, build.accumulators)  # type: ignore[no-any-return, no-untyped-call]


class _Linear(Function):
    # The parameter itself is kept beside what was saved of it: under a checkpoint that is another tensor.

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, bias: Tensor | None, into: Accumulators) -> Tensor:
        ctx.param, ctx.into, ctx.bias = weight, into, bias is not None
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        return dx, _weight_gradient(ctx.param, dy, x, ctx.into), _bias_gradient(dy) if ctx.bias else None, None


class _Made(Function):
    """The product of an input that is made for it, once more in the backward, and so never kept."""

    @staticmethod
    def forward(
        ctx: Any, lazy: Lazy, weight: nn.Parameter, bias: Tensor | None, build: Build, entering: bool, *inputs: Tensor
    ) -> Tensor:
        ctx.param, ctx.bias, ctx.made_by, ctx.build, ctx.entering = (
            weight,
            bias is not None,
            lazy.made_by,
            build,
            entering,
        )
        ctx.save_for_backward(weight, *inputs)
        x = lazy.made_by.forward(*(x.detach() for x in inputs))
        if entering:
            x = enter(x, build.tp, sequence_parallel=build.sequence_parallel)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        build, (weight, *inputs) = ctx.build, ctx.saved_tensors
        dx = dy @ weight
        if ctx.entering:  # the way out is the backward of the way in
            dx = leave(dx, build.tp, sequence_parallel=build.sequence_parallel)
        x, *gradients = ctx.made_by.both(dx, *inputs)
        if ctx.entering:
            x = enter(x, build.tp, sequence_parallel=build.sequence_parallel)
        dw = _weight_gradient(ctx.param, dy, x, build.accumulators)
        return None, dw, _bias_gradient(dy) if ctx.bias else None, None, None, *gradients


def add_product(total: Tensor, fresh: bool, dy: Tensor, x: Tensor) -> None:
    """total [d_out, d_in] (+)= dy^T x of dy [n, d_out], x [n, d_in]; on a GPU in one product with fp32 sums."""
    left = dy.t()
    if total.dtype == dy.dtype:
        torch.mm(left, x, out=total) if fresh else total.addmm_(left, x)
    elif total.is_cuda:
        if fresh:
            torch.ops.aten.mm.dtype_out(left, x, total.dtype, out=total)
        else:
            torch.ops.aten.addmm.dtype_out(total, left, x, total.dtype, out=total)
    elif fresh:
        total.copy_(left @ x)
    else:
        total.add_(left @ x)


def _weight_gradient(weight: nn.Parameter, dy: Tensor, x: Tensor, into: Accumulators | None) -> Tensor | None:
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    if into is None:
        return dy.t() @ x
    into.add(weight, partial(add_product, dy=dy, x=x))
    return None


def _bias_gradient(dy: Tensor) -> Tensor:
    return dy.reshape(-1, dy.shape[-1]).sum(0)
