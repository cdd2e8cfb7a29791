"""The same bits for every tp: whatever tp may cut is computed in a fixed number of slices, by the same calls.

Two things change the last bits where tp changes. The order of sums: partial results are added up slice by slice in one
tree (`stretto.ordered`), of which each rank has an aligned block, so no rank sees another association. And the kernels:
a GEMM, a reduction or the tail of a vector instruction rounds otherwise in another shape or at another alignment. So
each slice is computed for itself, from contiguous and aligned memory, as the rank with the fewest slices does it.

    what is sliced                        by                        sums
    columns of W: q, k, v, gate, up       features, heads           dx over slices
    rows of W: o, down                    features                  y over slices
    attention, norms of heads             heads                     gradients of shared keys and values, of weights
    norms, biases after a sum             tokens                    gradients of weights
    embedding, head                       words                     exponentials, the label's logit, dx

Where ranks hold copies of a parameter and each would have a part of its gradient, the first of them has the sum and the
others have zeros: what adds parts up at the end of a step adds zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stretto.attention import PLAIN, Attend, Scores
from stretto.collectives import all_gather, all_reduce
from stretto.ordered import tree_of, tree_sum
from stretto.params import ParamSpec
from stretto.structure import Structure
from stretto.tensor_parallel.build import Factor
from stretto.tensor_parallel.formulas import Formula
from stretto.tensor_parallel.linear import accumulate_matmul, rows
from stretto.world import Axis

ALIGNED = 256
"""Bytes: kernels are chosen by the alignment of what they are given, up to this (cuBLAS) or less (MKL: 64)."""


@dataclass(frozen=True)
class Slices:
    """`number` slices, a power of two, of all that tp may cut; `tp` divides it, and each rank has `here` of them."""

    number: int
    tp: Axis
    sequence_parallel: bool

    @property
    def here(self) -> int:
        """Slices of this rank."""
        return self.number // self.tp.size

    def columns(self, stack: Sequence[tuple[int, int]]) -> SlicedColumns:
        """GEMMs of a weight that is a stack of (rows, most slices): key heads are fewer than slices may be."""
        return SlicedColumns(self.here, tuple((n, min(self.here, most)) for n, most in stack))

    def words(self, spec: ParamSpec) -> ParamSpec:
        """The spec of an embedding or head whose ranks hold whole slices of the vocabulary, the last ones padded."""
        (cut,) = spec.shard
        each = -(-spec.shape[0] // self.number)
        return replace(spec, shard=(replace(cut, multiple=-(-each // cut.multiple) * cut.multiple * self.here),))

    def by_tokens(self, formula: Formula) -> Formula:
        """An operation on [s(/t), b, h] with weights that all tokens share."""
        n = self.here if self.sequence_parallel else self.number
        return _sliced(formula, lambda x: x.tensor_split(n), 0, lambda g: self._whole(g, self.sequence_parallel))

    def by_heads(self, formula: Formula) -> Formula:
        """An operation on [s, b, heads, d] with weights that all heads share."""
        return _sliced(formula, lambda x: x.chunk(min(self.here, x.shape[2]), 2), 2, lambda g: self._whole(g, True))

    def by_features(self, formula: Formula, stacked: int) -> Formula:
        """An operation on [.., stacked * f] -> [.., f], element by element: on a GPU all are computed alike."""

        def sliced(function: Callable[..., Any], widths: Sequence[int], made: Sequence[int]) -> Callable[..., Any]:
            def run(*inputs: Tensor, **bound: float) -> Any:
                if inputs[0].is_cuda or self.here == 1:
                    return function(*inputs, **bound)
                parts = [_features(x, self.here, of) for x, of in zip(inputs, widths, strict=True)]
                each = [_tuple(function(*part, **bound)) for part in zip(*parts, strict=True)]
                found = tuple(_joined(ys, of) for ys, of in zip(zip(*each, strict=True), made, strict=True))
                return found if len(widths) > 1 else found[0]

            return run

        return Formula(
            sliced(formula.forward, (stacked,), (1,)),
            sliced(formula.backward, (1, stacked), (stacked,)),
            sliced(formula.both, (1, stacked), (1, stacked)),
        )

    def _whole(self, parts: Sequence[Tensor], across: bool) -> Tensor:
        """The sum of the gradients of all slices, on the first rank where they lie on several."""
        total = tree_sum([part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts])
        if across and self.tp.size > 1:
            total = all_reduce(total, self.tp) * (self.tp.rank == 0)
        return total.to(parts[0].dtype)


class SlicedColumns:
    """`Gemms` of a weight whose rows tp cuts: of each part of the stack its own slices."""

    def __init__(self, here: int, stack: tuple[tuple[int, int], ...]) -> None:
        self.here = here
        self.sizes = [n // slices for n, slices in stack for _ in range(slices)]
        # Slices of a part that has fewer go to the first of those that they belong to.
        places = [i * (here // slices) for _, slices in stack for i in range(slices)]
        self.of_slice = [[n for n, place in enumerate(places) if place == j] for j in range(here)]

    def forward(
        self, x: Tensor, weight: nn.Parameter, bias: Tensor | None, *, column: bool, keep: bool
    ) -> tuple[Tensor, Factor]:
        """As `Gemms`."""
        del column
        x = placed(x)
        biases = [None] * len(self.sizes) if bias is None else bias.split(self.sizes)
        parts = zip(weight.split(self.sizes), biases, strict=True)
        y = torch.cat([F.linear(x, placed(w), None if b is None else placed(b)) for w, b in parts], -1)
        return y, (x,) if keep else ()

    def recompute(self, x: Tensor, kept: Factor) -> Factor:
        """As `Gemms`."""
        del kept
        return (placed(x),)

    def backward(self, dy: Tensor, weight: nn.Parameter, *, column: bool) -> tuple[Tensor, Factor]:
        """As `Gemms`; dx is a node of the tree over all slices."""
        del column
        dys, ws = [placed(part) for part in dy.split(self.sizes, -1)], weight.split(self.sizes)

        def term(j: int) -> Tensor:
            first, *more = self.of_slice[j]
            dx = dys[first] @ placed(ws[first])
            for n in more:
                dx = dx + dys[n] @ placed(ws[n])
            return dx

        return tree_of(term, self.here), tuple(dys)

    def add(self, total: Tensor, first_microbatch: bool, dy: Factor, x: Factor) -> None:
        """As `Gemms`."""
        for view, part in zip(total.split(self.sizes), dy, strict=True):
            add_matmul(view, first_microbatch, rows(part), rows(x[0]))

    def bias(self, dy: Tensor) -> Tensor:
        """As `Gemms`."""
        return torch.cat([rows(placed(part)).sum(0) for part in dy.split(self.sizes, -1)])


class SlicedRows:
    """`Gemms` of a weight whose columns tp cuts."""

    def __init__(self, here: int) -> None:
        self.here = here

    def forward(
        self, x: Tensor, weight: nn.Parameter, bias: Tensor | None, *, column: bool, keep: bool
    ) -> tuple[Tensor, Factor]:
        """As `Gemms`; y is a node of the tree over all slices."""
        del column, bias
        xs, ws = x.chunk(self.here, -1), weight.chunk(self.here, 1)
        y = tree_of(lambda j: F.linear(placed(xs[j]), placed(ws[j])), self.here)
        return y, (x,) if keep else ()

    def recompute(self, x: Tensor, kept: Factor) -> Factor:
        """As `Gemms`."""
        del kept
        return (x,)

    def backward(self, dy: Tensor, weight: nn.Parameter, *, column: bool) -> tuple[Tensor, Factor]:
        """As `Gemms`."""
        del column
        dy = placed(dy)
        return torch.cat([dy @ placed(w) for w in weight.chunk(self.here, 1)], -1), (dy,)

    def add(self, total: Tensor, first_microbatch: bool, dy: Factor, x: Factor) -> None:
        """As `Gemms`."""
        for view, part in zip(total.chunk(self.here, 1), x[0].chunk(self.here, -1), strict=True):
            add_matmul(view, first_microbatch, rows(dy[0]), rows(placed(part)))

    def bias(self, dy: Tensor) -> Tensor:
        """As `Gemms`: there is none before the sum."""
        raise NotImplementedError(f"a bias before the sum over tp, of a gradient {tuple(dy.shape)}")


class SlicedAttention:
    """An `Attend` of this rank's heads, some at a time; `copies` ranks hold the same keys and values."""

    def __init__(self, attend: Attend, slices: Slices, *, kv_heads: int) -> None:
        self.attend, self.here, self.tp = attend, slices.here, slices.tp
        self.copies = max(1, slices.tp.size // kv_heads)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scores: Scores = PLAIN,
        structure: Structure | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """As `Attend`."""
        n = self.here
        shared = (n, self.copies, self.tp)
        each = (_Cut.apply(q, n, 1), *(_Shared.apply(x, *shared) for x in (k, v)))  # type: ignore[no-untyped-call]
        sunk = [None] * n if sinks is None else _Cut.apply(sinks, n, 0)  # type: ignore[no-untyped-call]
        ys = [self.attend(*qkv, scores, structure, sink) for *qkv, sink in zip(*each, sunk, strict=True)]
        return join(ys, 1)


def cut(x: Tensor, n: int, dim: int) -> tuple[Tensor, ...]:
    """x in n parts along `dim`, each in memory of its own, and so their gradients."""
    return _Cut.apply(x, n, dim)  # type: ignore[no-any-return, no-untyped-call]


def join(parts: Sequence[Tensor], dim: int) -> Tensor:
    """The way back."""
    return _Join.apply(dim, *parts)  # type: ignore[no-any-return, no-untyped-call]


def spread(x: Tensor, n: int) -> tuple[Tensor, ...]:
    """x for n slices, whose gradients are added up in the tree."""
    return _Spread.apply(x, n)  # type: ignore[no-any-return, no-untyped-call]


def placed(x: Tensor) -> Tensor:
    """The same where kernels find it alike, however it was cut out: contiguous and aligned."""
    x = x.contiguous()
    return x if x.data_ptr() % (ALIGNED if x.is_cuda else 64) == 0 else x.clone()


def add_matmul(total: Tensor, first_microbatch: bool, dy: Tensor, x: Tensor) -> None:
    """total [d_out, d_in], a part of a larger one, (+)= dy^T x of dy [n, d_out], x [n, d_in]."""
    part = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    accumulate_matmul(part, True, dy, x)
    total.copy_(part) if first_microbatch else total.add_(part)


def _sliced(
    formula: Formula,
    cut: Callable[[Tensor], Sequence[Tensor]],
    dim: int,
    whole: Callable[[Sequence[Tensor]], Tensor],
) -> Formula:
    """`formula` of each part of its first input, beside which stand the same parts of the gradients."""

    def forward(x: Tensor, *weights: Tensor, **bound: float) -> Tensor:
        return torch.cat([formula.forward(placed(part), *weights, **bound) for part in cut(x)], dim)

    def back(function: Callable[..., tuple[Tensor, ...]], along: int) -> Callable[..., tuple[Tensor, ...]]:
        """Of what `function` gives so many first ones lie along `dim`, the others are gradients of weights."""

        def run(
            dy: Tensor, x: Tensor, *weights: Tensor, dresidual: Tensor | None = None, **bound: Any
        ) -> tuple[Tensor, ...]:
            beside = [dy, x] if dresidual is None else [dy, x, dresidual]
            each = []
            for d, part, *residual in zip(*(map(placed, cut(t)) for t in beside), strict=True):
                given = {"dresidual": residual[0]} if residual else {}
                each.append(function(d, part, *weights, **given, **bound))
            found = list(zip(*each, strict=True))
            return *(torch.cat(x, dim) for x in found[:along]), *(whole(x) for x in found[along:])

        return run

    return Formula(forward, back(formula.backward, 1), back(formula.both, 2))


def _features(x: Tensor, n: int, stacked: int) -> list[Tensor]:
    """[.., stacked * n * f] -> n times [.., stacked * f]."""
    wide = x.unflatten(-1, (stacked, n, -1))
    return [wide[..., j, :].flatten(-2).contiguous() for j in range(n)]


def _joined(parts: Sequence[Tensor], stacked: int) -> Tensor:
    """The way back."""
    return torch.stack([x.unflatten(-1, (stacked, -1)) for x in parts], -2).flatten(-3)


def _tuple(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else found


class _Cut(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int, dim: int) -> tuple[Tensor, ...]:
        ctx.dim = dim
        return _parts(x, n, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        return torch.cat(dys, ctx.dim), None, None


class _Join(Function):
    @staticmethod
    def forward(ctx: Any, dim: int, *parts: Tensor) -> Tensor:
        ctx.n, ctx.dim = len(parts), dim
        return torch.cat(parts, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_parts(dy, ctx.n, ctx.dim)


class _Spread(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int) -> tuple[Tensor, ...]:
        return tuple(x.clone() for _ in range(n))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        return tree_sum(dys), None


class _Shared(Function):
    """Heads [b, heads, s, d] for n slices: several of them each, or one for several slices, and for several ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int, copies: int, tp: Axis) -> tuple[Tensor, ...]:
        ctx.heads, ctx.each, ctx.copies, ctx.tp = x.shape[1], max(1, n // x.shape[1]), copies, tp
        parts = _parts(x, n // ctx.each, 1)
        return tuple(part if i == 0 else part.clone() for part in parts for i in range(ctx.each))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        each, copies, tp = ctx.each, ctx.copies, ctx.tp
        dx = torch.cat([tree_sum(dys[i : i + each]) for i in range(0, len(dys), each)], 1)
        if copies > 1:
            first = tp.rank // copies * copies
            terms = all_gather(dx.contiguous().unsqueeze(0), tp)[first : first + copies]
            dx = tree_sum(terms) if tp.rank == first else torch.zeros_like(dx)
        return dx, None, None, None


def _parts(x: Tensor, n: int, dim: int) -> tuple[Tensor, ...]:
    return tuple(part.clone(memory_format=torch.contiguous_format) for part in x.chunk(n, dim))
