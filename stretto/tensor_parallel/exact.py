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
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from stretto.attention import PLAIN, Attend, Scores
from stretto.collectives import all_gather, all_reduce
from stretto.ordered import tree_sum
from stretto.params import ParamSpec
from stretto.structure import Structure
from stretto.tensor_parallel.formulas import Formula
from stretto.tensor_parallel.sliced_gemms import SlicedColumns, placed
from stretto.world import Axis


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
        ks, vs = (_Shared.apply(x, n, self.copies, self.tp) for x in (k, v))  # type: ignore[no-untyped-call]
        sunk = [None] * n if sinks is None else cut(sinks, n, 0)
        each = zip(cut(q, n, 1), ks, vs, sunk, strict=True)
        ys = [self.attend(q, k, v, scores, structure, sink) for q, k, v, sink in each]
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
    wide = torch.unflatten(x, -1, (stacked, n, -1))
    return [wide[..., j, :].flatten(-2).contiguous() for j in range(n)]


def _joined(parts: Sequence[Tensor], stacked: int) -> Tensor:
    """The way back."""
    return torch.stack([torch.unflatten(x, -1, (stacked, -1)) for x in parts], -2).flatten(-3)


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
    def forward(_: Any, x: Tensor, n: int) -> tuple[Tensor, ...]:
        return tuple(x.clone() for _ in range(n))

    @staticmethod
    @once_differentiable
    def backward(_: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
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
            dx = tree_sum(terms.unbind()) if tp.rank == first else torch.zeros_like(dx)
        return dx, None, None, None


def _parts(x: Tensor, n: int, dim: int) -> tuple[Tensor, ...]:
    return tuple(part.clone(memory_format=torch.contiguous_format) for part in x.chunk(n, dim))
