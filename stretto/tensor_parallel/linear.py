"""The matrix product of the parallel layers, with its three products forward and back under our hand.

Beyond `F.linear` it can make its input itself (`Lazy`), and add the gradient of its weight up where it is wanted
(`Accumulators`), in the product that computes it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stretto.tensor_parallel.build import Build, Factor, Products
from stretto.tensor_parallel.mappings import enter, leave
from stretto.tensor_parallel.pointwise import Lazy, gradients


def linear(
    x: Tensor | Lazy, weight: nn.Parameter, bias: Tensor | None, build: Build, *, entering: bool = False
) -> Tensor:
    """y = x W^T + b: x [.., d_in], W [d_out, d_in] -> [.., d_out].

    `entering` leads x into the tensor-parallel region first: it is gathered, or its gradient summed.
    """
    if isinstance(x, Lazy):
        y, x.past = _Made.apply(x, weight, bias, build, entering, *x.inputs)  # type: ignore[no-untyped-call]
        return cast("Tensor", y)
    if entering:
        x = enter(x, build.tp, sequence_parallel=build.sequence_parallel)
    if build.accumulators is None and build.products is None:
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, build, entering)  # type: ignore[no-any-return, no-untyped-call]


class _Linear(Function):
    # The parameter itself is kept beside what was saved of it: under a checkpoint that is another tensor.

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, bias: Tensor | None, build: Build, column: bool) -> Tensor:
        ctx.param, ctx.build, ctx.column, ctx.bias = weight, build, column, bias is not None
        y, kept = _products(build).forward(x, weight, bias, column=column, keep=True)
        ctx.save_for_backward(weight, *kept)  # the weight for autograd's check that nobody has changed it
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _, *x = ctx.saved_tensors
        dx, left = _products(ctx.build).backward(dy, ctx.param, column=ctx.column)
        dw = _weight_gradient(ctx.param, ctx.build, left, tuple(x))
        return dx, dw, _bias_gradient(dy) if ctx.bias else None, None, None


class _Made(Function):
    """The product of an input that is made for it, once more in the backward, and so never kept."""

    @staticmethod
    def forward(
        ctx: Any, lazy: Lazy, weight: nn.Parameter, bias: Tensor | None, build: Build, entering: bool, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.param, ctx.bias, ctx.made_by, ctx.build, ctx.entering = (
            weight,
            bias is not None,
            lazy.made_by,
            build,
            entering,
        )
        x = lazy.made_by.forward(*(x.detach() for x in inputs))
        if entering:
            x = enter(x, build.tp, sequence_parallel=build.sequence_parallel)
        y, kept = _products(build).forward(x, weight, bias, column=entering, keep=False)
        ctx.inputs = len(inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, *inputs, *kept)
        return y, inputs[0].view_as(inputs[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, past: Tensor | None) -> tuple[Tensor | None, ...]:
        build, (_, *saved) = ctx.build, ctx.saved_tensors
        inputs, kept = saved[: ctx.inputs], tuple(saved[ctx.inputs :])
        products = _products(build)
        dx, left = products.backward(dy, ctx.param, column=ctx.entering)
        if ctx.entering:  # the way out is the backward of the way in
            dx = leave(dx, build.tp, sequence_parallel=build.sequence_parallel)
        x, *rest = gradients(ctx.made_by.both, dx, past, *inputs)
        if ctx.entering:
            x = enter(x, build.tp, sequence_parallel=build.sequence_parallel)
        dw = _weight_gradient(ctx.param, build, left, products.again(x, kept))
        return None, dw, _bias_gradient(dy) if ctx.bias else None, None, None, *rest


class _Plain:
    """The products in the dtype of their factors."""

    def forward(
        self, x: Tensor, weight: nn.Parameter, bias: Tensor | None, *, column: bool, keep: bool
    ) -> tuple[Tensor, Factor]:
        del column
        return F.linear(x, weight, bias), (x,) if keep else ()

    def again(self, x: Tensor, kept: Factor) -> Factor:
        del kept
        return (x,)

    def backward(self, dy: Tensor, weight: nn.Parameter, *, column: bool) -> tuple[Tensor, Factor]:
        del column
        return dy @ weight, (dy,)

    def add(self, total: Tensor, fresh: bool, dy: Factor, x: Factor) -> None:
        add_product(total, fresh, rows(dy[0]), rows(x[0]))


_PLAIN = _Plain()


def _products(build: Build) -> Products:
    return build.products or _PLAIN


def rows(x: Tensor) -> Tensor:
    """[.., d] -> [n, d]."""
    return x.reshape(-1, x.shape[-1])


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


def _weight_gradient(weight: nn.Parameter, build: Build, dy: Factor, x: Factor) -> Tensor | None:
    write = partial(_products(build).add, dy=dy, x=x)
    if build.accumulators is None:
        total = torch.empty_like(weight)
        write(total, True)
        return total
    build.accumulators.add(weight, write)
    return None


def _bias_gradient(dy: Tensor) -> Tensor:
    return rows(dy).sum(0)
