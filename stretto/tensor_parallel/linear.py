"""The GEMM of the parallel layers, with its three products forward and back under our hand.

Beyond `F.linear` it crosses the border of the tensor-parallel region, can make its input itself (`Lazy`), and adds the
gradient of its weight up where it is wanted (`Accumulators`), in the product that computes it. A message of the
backward passes behind such a gradient, that of the product before; one of the forward behind a part of its own product
(`overlap`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stretto.autograd import Function, Region, Value, adjoint
from stretto.collectives import all_gather_async
from stretto.tensor_parallel.build import Build, Factor, Gemms
from stretto.tensor_parallel.mappings import enter, leave
from stretto.tensor_parallel.overlap import gathered, overlaps, scattered
from stretto.tensor_parallel.pointwise import Lazy, Pointwise, gradients
from stretto.world import AsyncTensor


def linear(x: Tensor | Lazy, weight: nn.Parameter, bias: Tensor | None, build: Build, *, column: bool) -> Tensor:
    """y = x W^T + b: x [.., d_in], W [d_out, d_in] -> [.., d_out].

    Where `column`, tp cuts W along d_out, and x enters the tensor-parallel region for it; else W is cut along d_in, and
    y leaves the region (and b is to be added by who knows that there is only one).
    """
    if isinstance(x, Lazy):
        gemm = Gemm(weight, build, column)
        recorded = gemm.recorded(*x.inputs)
        y, x.residual = _Made.apply((x.made_by, gemm), recorded, bias, *x.inputs)  # type: ignore[no-untyped-call]
        return cast("Tensor", y)
    if build.accumulators is not None or build.gemms is not None:
        gemm = Gemm(weight, build, column)
        return _Linear.apply(gemm, gemm.recorded(x), bias, x)  # type: ignore[no-any-return, no-untyped-call]
    if column:
        return F.linear(enter(x, build.tp, sequence_parallel=build.sequence_parallel), weight, bias)
    return leave(F.linear(x, weight, bias), build.tp, sequence_parallel=build.sequence_parallel)


def record_linear(region: Region, gemm: Gemm, bias: nn.Parameter | None, x: Value) -> Value:
    """`linear` in a region, whose accumulators get the gradient of the weight."""
    region.watched.append(gemm.weight)
    (y,) = region.add(_Linear, gemm, region.nothing, region.parameter(bias), x)
    return y


def record_made(
    region: Region, made_by: Pointwise, gemm: Gemm, bias: nn.Parameter | None, *inputs: Value
) -> tuple[Value, Value]:
    """`linear` of an input that is made for it, and the first of what that is made of."""
    region.watched.append(gemm.weight)
    y, first = region.add(_Made, (made_by, gemm), region.nothing, region.parameter(bias), *inputs, writes=2)
    return y, first


@dataclass(slots=True)
class Gemm:
    """What a product needs of its place. The parameter itself: under a checkpoint what is saved of it is another."""

    weight: nn.Parameter
    build: Build
    column: bool

    def recorded(self, *inputs: Tensor) -> Tensor | None:
        """The weight, where autograd must see it: its gradient comes through autograd, or of no input is one wanted.

        Elsewhere autograd would visit the weight in each backward, and call its hooks, with nothing for it.
        """
        if self.build.accumulators is not None:
            for x in inputs:
                if x.requires_grad:
                    return None
        return self.weight


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, gemm: Gemm, recorded: Tensor | None, bias: Tensor | None, x: Tensor) -> Tensor:
        del recorded
        ctx.gemm, ctx.bias = gemm, bias is not None and bias.requires_grad
        weight = gemm.weight
        y, kept = _matmul(x, weight, bias, gemm.build, column=gemm.column, keep=weight.requires_grad)
        ctx.save_for_backward(weight, *kept)  # the weight for autograd's check that nobody has changed it
        return y

    @staticmethod
    @adjoint
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gemm, (_, *x) = ctx.gemm, ctx.saved_tensors
        dx, dy, factor = _input_gradient(dy, gemm.weight, gemm.build, column=gemm.column)
        dw = _weight_gradient(gemm.weight, gemm.build, factor, lambda: tuple(x))
        return None, dw, _gemms(gemm.build).bias(dy) if ctx.bias else None, dx


class _Made(Function):
    """The product of an input that is made for it, once more in the backward, and so never kept."""

    @staticmethod
    def forward(
        ctx: Any, op: tuple[Pointwise, Gemm], recorded: Tensor | None, bias: Tensor | None, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        del recorded
        made_by, gemm = op
        ctx.gemm, ctx.bias = gemm, bias is not None and bias.requires_grad
        ctx.made_by, ctx.inputs = made_by, len(inputs)
        x = made_by.forward(*inputs)
        y, kept = _matmul(x, gemm.weight, bias, gemm.build, column=gemm.column, keep=False)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gemm.weight, *inputs, *kept)
        return y, inputs[0].view_as(inputs[0])

    @staticmethod
    @adjoint
    def backward(ctx: Any, dy: Tensor, dresidual: Tensor | None) -> tuple[Tensor | None, ...]:
        gemm, (_, *saved) = ctx.gemm, ctx.saved_tensors
        build, inputs, kept = gemm.build, saved[: ctx.inputs], tuple(saved[ctx.inputs :])
        dx, dy, factor = _input_gradient(dy, gemm.weight, build, column=gemm.column)
        x, *rest = gradients(ctx.made_by.both, dx, dresidual, *inputs)
        gathers = gemm.column and build.sequence_parallel and gemm.weight.requires_grad
        recomputed = all_gather_async(x, build.tp) if gathers else AsyncTensor(x)
        dw = _weight_gradient(gemm.weight, build, factor, lambda: _gemms(build).recompute(recomputed.wait(), kept))
        return None, dw, _gemms(build).bias(dy) if ctx.bias else None, *rest


def _matmul(
    x: Tensor, weight: nn.Parameter, bias: Tensor | None, build: Build, *, column: bool, keep: bool
) -> tuple[Tensor, Factor]:
    """y, on its side of the border, and what is kept of x for the weight's gradient."""
    if (column or bias is None) and overlaps(x, build, column=column, d_out=weight.shape[0]):
        if column:
            y, x = gathered(x, weight, bias, build.tp)
        else:
            y = scattered(x, weight, build.tp)
        return y, (x,) if keep else ()
    x = _entered(x, build) if column else x
    y, kept = _gemms(build).forward(x, weight, bias, column=column, keep=keep)
    return y if column else _left(y, build), kept


def _input_gradient(dy: Tensor, weight: nn.Parameter, build: Build, *, column: bool) -> tuple[Tensor, Tensor, Factor]:
    """dx, the whole dy, and dy as `Gemms.add` wants it: the way out is the backward of the way in."""
    dy = dy if column else _entered(dy, build)
    dx, factor = _gemms(build).backward(dy, weight, column=column)
    return _left(dx, build) if column else dx, dy, factor


def _weight_gradient(weight: nn.Parameter, build: Build, dy: Factor, x: Callable[[], Factor]) -> Tensor | None:
    """dW, or None where accumulators get it, or nobody wants it; x is asked for when it is multiplied."""
    if not weight.requires_grad:
        return None

    def write(total: Tensor, first_microbatch: bool) -> None:
        _gemms(build).add(total, first_microbatch, dy, x())

    if build.accumulators is None:
        total = torch.empty_like(weight)
        write(total, True)
        return total
    # A rank that is alone has no message to hide: what it defers would only be held for longer.
    (build.accumulators.defer if build.tp.size > 1 else build.accumulators.add)(weight, write)
    return None


def _entered(x: Tensor, build: Build) -> Tensor:
    return enter(x, build.tp, sequence_parallel=build.sequence_parallel, overlap_with=build.overlap_with)


def _left(x: Tensor, build: Build) -> Tensor:
    return leave(x, build.tp, sequence_parallel=build.sequence_parallel, overlap_with=build.overlap_with)


class _Plain:
    """The products in the dtype of their factors."""

    def expect(self, weight: nn.Parameter) -> None:
        """It takes any."""

    def forward(
        self, x: Tensor, weight: nn.Parameter, bias: Tensor | None, *, column: bool, keep: bool
    ) -> tuple[Tensor, Factor]:
        del column
        return F.linear(x, weight, bias), (x,) if keep else ()

    def recompute(self, x: Tensor, kept: Factor) -> Factor:
        del kept
        return (x,)

    def backward(self, dy: Tensor, weight: nn.Parameter, *, column: bool) -> tuple[Tensor, Factor]:
        del column
        return dy @ weight, (dy,)

    def add(self, total: Tensor, first_microbatch: bool, dy: Factor, x: Factor) -> None:
        accumulate_matmul(total, first_microbatch, rows(dy[0]), rows(x[0]))

    def bias(self, dy: Tensor) -> Tensor:
        return rows(dy).sum(0)


_PLAIN = _Plain()


def _gemms(build: Build) -> Gemms:
    return build.gemms or _PLAIN


def rows(x: Tensor) -> Tensor:
    """[.., d] -> [n, d]."""
    return x.reshape(-1, x.shape[-1])


def accumulate_matmul(total: Tensor, first_microbatch: bool, dy: Tensor, x: Tensor) -> None:
    """total [d_out, d_in] (+)= dy^T x of dy [n, d_out], x [n, d_in]; on a GPU in one product with fp32 sums."""
    left = dy.t()
    if total.dtype == dy.dtype:
        torch.mm(left, x, out=total) if first_microbatch else total.addmm_(left, x)
    elif total.is_cuda:
        if first_microbatch:
            torch.ops.aten.mm.dtype_out(left, x, total.dtype, out=total)
        else:
            torch.ops.aten.addmm.dtype_out(total, left, x, total.dtype, out=total)
    elif first_microbatch:
        total.copy_(left @ x)
    else:
        total.add_(left @ x)
