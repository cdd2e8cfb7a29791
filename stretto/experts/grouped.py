"""Grouped GEMMs: rows of each expert times its own matrix.

On a GPU in bf16 by `torch.nn.functional.grouped_mm`, which takes no fp64 and leaves rows beyond the last offset as they
were: there are none. Elsewhere by a loop over experts and, within one, over the ranks that its rows come from: so the
bits of a row do not depend on how many ranks share the experts. Weight gradients are added up in the buckets, in fp32
or wider, by one product for each expert or, on a GPU, by one kernel for all; one without rows gets zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stretto.experts.fp8 import GroupedFp8
from stretto.experts.segments import Segments
from stretto.params import ParamSpec, declare
from stretto.tensor_parallel import Build, Lazy
from stretto.tensor_parallel.layers import expect
from stretto.tensor_parallel.linear import accumulate_matmul

_grouped_mm: Final[Any] = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
"""torch 2.11 has it under its private name alone."""


class Factors(NamedTuple):
    """Of a weight gradient dy^T x: dy [m, d_out] and x [m, d_in], and which of their rows are of which expert."""

    dy: Tensor
    x: Tensor
    segments: Segments


class Joined:
    """The factors of one weight gradient, whose rows come in so many parts: one product reads and writes the sum, which
    is in fp32 and larger than they are, once for all of them."""

    def __init__(self, parts: int) -> None:
        self._missing, self._factors = parts, list[Factors]()

    def all(self, factors: Factors) -> Sequence[Factors]:
        """With these, when they are the last; none as long as others are missing."""
        self._missing -= 1
        self._factors.append(factors)
        if self._missing:
            return ()
        found, self._factors = self._factors, []
        return found


class GroupedLinear(nn.Module):
    """y = x W_e^T for the rows of each expert e that this rank holds: [m, d_in] -> [m, d_out].

    `specs` are the matrices, expert by expert, stacked along their rows: d_out for each expert; `biases` those of their
    biases, if they have any. `column` says that etp cuts the rows of each matrix; else it cuts the columns, its ranks'
    outputs are parts of a sum, and one of them alone adds biases. With `fp8` two of the three products are in it.
    """

    def __init__(
        self,
        specs: list[ParamSpec],
        biases: list[ParamSpec],
        experts: int,
        build: Build,
        *,
        column: bool,
        fp8: GroupedFp8 | None = None,
    ) -> None:
        super().__init__()
        self.build, self.experts, self.column, self.fp8 = build, experts, column, fp8
        self.adds = column or build.experts.etp.rank == 0
        self.add_products = build.fuse(add_products)
        self.weight = self._declared("weight", specs)
        self.bias = self._declared("bias", biases) if biases else None
        expect(self.weight, build)

    def _declared(self, name: str, specs: list[ParamSpec]) -> nn.Parameter:
        build = self.build
        param = declare(self, name, specs, axes=[build.experts.etp], dtype=build.dtype, device=build.device)
        if not build.allocate:
            param.untyped_storage().resize_(0)
        return param

    def forward(self, x: Tensor | Lazy, segments: Segments, joined: Joined) -> Tensor:
        made_by, inputs = (x.made_by, x.inputs) if isinstance(x, Lazy) else (None, (x,))
        y: Tensor = _Grouped.apply(self, segments, joined, made_by, self.weight, *inputs)  # type: ignore[no-untyped-call]
        if self.bias is None:
            return y
        return _Biased.apply(y, self.bias, self, segments)  # type: ignore[no-any-return, no-untyped-call]

    def times(self, x: Tensor, weight: Tensor, segments: Segments) -> Tensor:
        """The products themselves, with the parameter or what stands for it under a checkpoint."""
        if self.fp8 is not None:
            return self.fp8.times(x, self.weight, segments, column=self.column)
        return multiply(x, stacked(weight, self.experts).transpose(1, 2), segments)

    def back(self, dy: Tensor, segments: Segments) -> Tensor:
        """The gradient of x."""
        if self.fp8 is not None:
            return self.fp8.back(dy, self.weight, segments, column=self.column)
        return multiply(dy, stacked(self.weight, self.experts), segments)

    def add_gradient(self, dy: Tensor, x: Tensor, segments: Segments, joined: Joined) -> Tensor | None:
        """dy^T x of each expert's rows, to the accumulators, with the other parts; where there are none, as a
        tensor."""
        accumulators, factors = self.build.accumulators, Factors(dy, x, segments)
        if accumulators is None:
            dw = torch.empty_like(self.weight)
            add_products(stacked(dw, self.experts), True, *factors)
            return dw
        every = joined.all(factors)
        if not every:
            return None

        def write(total: Tensor, first_microbatch: bool) -> None:
            some = [each for each in every if len(each.x)] or every[:1]
            at_once = total.dtype == torch.float32 and all(takes_at_once(each.dy, each.x) for each in some)
            add = self.add_products if at_once else add_products
            add(stacked(total, self.experts), first_microbatch, *(tensor for each in some for tensor in each))

        # A rank that exchanges nothing has no message to hide: what it defers would only be held for longer.
        (accumulators.defer if self.build.experts.exchange.size > 1 else accumulators.add)(self.weight, write)
        return None

    def bias_gradient(self, dy: Tensor, segments: Segments) -> Tensor:
        """The sum of each expert's rows of dy, in fp32 or wider, of the rank that adds the biases."""
        assert self.bias is not None
        db = torch.zeros_like(self.bias)
        if self.adds:
            for one, part in zip(db.view(-1, dy.shape[1]), torch.split(dy, segments.experts), strict=True):
                if len(part):
                    one.copy_(part.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)))
        return db


class _Grouped(Function):
    # The parameter itself is kept beside what was saved of it: under a checkpoint that is another tensor.

    @staticmethod
    def forward(
        ctx: Any,
        of: GroupedLinear,
        segments: Segments,
        joined: Joined,
        made_by: Any,
        weight: nn.Parameter,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.of, ctx.segments, ctx.joined, ctx.made_by = of, segments, joined, made_by
        x = inputs[0] if made_by is None else made_by.forward(*(x.detach() for x in inputs))
        ctx.save_for_backward(weight, *inputs)
        return of.times(x, weight, segments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        of, segments, (_, *inputs) = ctx.of, ctx.segments, ctx.saved_tensors
        dy = dy.contiguous()
        dx = of.back(dy, segments)
        if ctx.made_by is None:
            x, gradients = inputs[0], (dx,)
        else:
            x, *gradients = ctx.made_by.both(dx, *inputs)

        return None, None, None, None, of.add_gradient(dy, x, segments, ctx.joined), *gradients


class _Biased(Function):
    """y [m, d_out] with the bias of each row's expert, of biases [experts * d_out] one after another."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor, of: GroupedLinear, segments: Segments) -> Tensor:
        ctx.of, ctx.segments = of, segments
        add_bias(y, bias, segments)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return dy, ctx.of.bias_gradient(dy, ctx.segments), None, None


def add_bias(y: Tensor, bias: Tensor, segments: Segments) -> None:
    """To the rows of each expert, in place, its own."""
    for one, part in zip(bias.detach().view(-1, y.shape[1]), torch.split(y, segments.experts), strict=True):
        part += one


def of_bias(dy: Tensor, bias: Tensor, segments: Segments) -> Tensor:
    """[m, 1]: the product of each row with its expert's bias."""
    parts = zip(bias.detach().view(-1, dy.shape[1]), torch.split(dy, segments.experts), strict=True)
    return torch.cat([part @ one.to(dy.dtype)[:, None] for one, part in parts])


def add_products(total: Tensor, first_microbatch: bool, *factors: Any) -> None:
    """total [experts, d_out, d_in] (+)= dy^T x over the rows of each expert, of one or more `Factors`, one after
    another.

    On a GPU this is one kernel (`stretto.kernels.grouped`).
    """
    split = []
    for dy, x, segments in zip(*[iter(factors)] * 3, strict=True):
        sizes = segments.experts
        split.append(zip(torch.split(dy, sizes), torch.split(x, sizes), strict=True))
    for each, *parts in zip(total.unbind(), *split, strict=True):
        first = first_microbatch
        for left, right in parts:
            if len(left):
                accumulate_matmul(each, first, left, right)
                first = False
        if first:
            each.zero_()


def stacked(weight: Tensor, experts: int) -> Tensor:
    """[experts * d_out, d_in] -> [experts, d_out, d_in]."""
    return weight.view(experts, -1, weight.shape[-1])


def multiply(x: Tensor, matrices: Tensor, segments: Segments) -> Tensor:
    """x [m, a] times the matrix [a, b] of each row's expert, of `matrices` [experts, a, b]: [m, b]."""
    if takes_grouped(x, matrices):
        grouped: Tensor = _grouped_mm(x, matrices, offs=segments.ends)
        return grouped
    y = x.new_empty((x.shape[0], matrices.shape[2]))
    for expert, begin, end in segments.parts():
        torch.mm(x[begin:end], matrices[expert], out=y[begin:end])
    return y


def takes_at_once(dy: Tensor, x: Tensor) -> bool:
    """Whether the kernel of all weight gradients takes them: bf16 on a GPU, some rows, whole tiles."""
    whole = dy.shape[1] % 128 == 0 and x.shape[1] % 128 == 0
    return whole and x.is_cuda and x.dtype == torch.bfloat16 and bool(len(x))


def takes_grouped(x: Tensor, matrices: Tensor) -> bool:
    """Whether torch's grouped GEMM takes it: bf16 on a GPU, some rows, strides of 16 bytes."""
    strides = (s for t in (x, matrices) for s in t.stride() if s != 1)
    aligned = all(s * x.element_size() % 16 == 0 for s in strides)
    return _grouped_mm is not None and x.is_cuda and x.dtype == torch.bfloat16 and bool(len(x)) and aligned
