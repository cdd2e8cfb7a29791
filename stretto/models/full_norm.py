"""RMSNorm over the features of all heads together, as in OLMo 2, whose heads are cut over the tensor-parallel ranks.

With x one rank's part of a token's features, n features in all, and m = sum(x^2) / n over all ranks,

    y = x w / sqrt(m + eps)        dx = dy w / sqrt(m + eps) - x p / n / (m + eps)^(3/2)

where p is the sum of dy w x over all ranks. So each way takes one number of a token from the ranks, for queries and
keys in one all-reduce. The input alone is kept, and the means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from stretto.collectives import all_reduce, all_reduce_
from stretto.ordered import tree_sum
from stretto.params import Init, ParamSpec, Shard
from stretto.tensor_parallel import Build, Pointwise, declare_on, formulas
from stretto.tensor_parallel.exact import Slices, cut, join, spread


def mean_square(x: Tensor, features: int) -> Tensor:
    """This rank's share [.., 1] of the mean square over so many features, in fp32 or wider."""
    return formulas.widened(x).square().sum(-1, keepdim=True) / features


def scaled(x: Tensor, mean: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [.., d] with the mean square [.., 1] of its token and weights [d]."""
    return (x * torch.rsqrt(mean + eps) * weight).to(x.dtype)


def products(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """This rank's share [.., 1] of p."""
    return (formulas.widened(dy) * weight * formulas.widened(x)).sum(-1, keepdim=True)


def scaled_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, p: Tensor, features: int, eps: float
) -> tuple[Tensor, Tensor]:
    """dx and dw."""
    scale, d = torch.rsqrt(mean + eps), formulas.widened(dy)
    n = x * scale
    dx = (d * weight - n * (p * scale / features)) * scale
    return dx.to(x.dtype), (d * n).flatten(0, -2).sum(0).to(weight.dtype)


@dataclass(frozen=True)
class FullNormOps:
    """The formulas as a build wants them computed: `whole` where a rank has all heads."""

    whole: Pointwise
    mean_square: Callable[..., Tensor]
    scaled: Callable[..., Tensor]
    products: Callable[..., Tensor]
    scaled_backward: Callable[..., tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, build: Build, eps: float) -> FullNormOps:
        parts = (build.fuse(each) for each in (mean_square, scaled, products, scaled_backward))
        return cls(Pointwise.of(formulas.RMS_NORM, build, eps=eps), *parts)


class FullNorm(nn.Module):
    """The weights of the heads that this rank has, of queries or of keys.

    Where `copies` ranks hold the same heads each has a part of their gradient, and counts for a part of the sum.
    """

    def __init__(self, heads: int, dim: int, eps: float, build: Build, *, copies: int = 1) -> None:
        super().__init__()
        self.features, self.eps, self.copies = heads * dim * copies, eps, copies
        self.first = build.tp.rank % copies == 0
        held = Shard("tp", 0, copies=copies)
        sums = ("tp",) if copies > 1 else ()
        spec = ParamSpec((heads * dim,), Init(mean=1.0), shard=(held,), sum_grad=sums, weight_decay=False)
        self.weight = declare_on(self, "weight", spec, build)


def full_norms(
    q_norm: FullNorm, k_norm: FullNorm, q: Tensor, k: Tensor, build: Build, ops: FullNormOps
) -> tuple[Tensor, Tensor]:
    """Queries and keys [s, b, heads/t, d] normed, each over all heads."""
    if build.exact is not None:
        return _exact_norms(q_norm, k_norm, q, k, build.exact)
    heads, norms = (q.flatten(-2), k.flatten(-2)), (q_norm, k_norm)
    if build.tp.size == 1:
        made = [ops.whole.now(x, norm.weight) for x, norm in zip(heads, norms, strict=True)]
    else:
        made = _Across.apply(norms, build, ops, *heads, q_norm.weight, k_norm.weight)  # type: ignore[no-untyped-call]
    return made[0].view(q.shape), made[1].view(k.shape)


class _Across(Function):
    @staticmethod
    def forward(
        ctx: Any, norms: tuple[FullNorm, FullNorm], build: Build, ops: FullNormOps, *given: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.norms, ctx.build, ctx.ops = norms, build, ops
        x, weights = given[:2], given[2:]
        means = torch.stack([ops.mean_square(each, norm.features) for each, norm in zip(x, norms, strict=True)])
        all_reduce_(means, build.tp).wait()
        ctx.save_for_backward(*given, means)
        each = zip(x, means, weights, norms, strict=True)
        return tuple(ops.scaled(one, mean, weight.detach(), norm.eps) for one, mean, weight, norm in each)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:
        norms, ops, (*given, means) = ctx.norms, ctx.ops, ctx.saved_tensors
        x, weights = given[:2], [weight.detach() for weight in given[2:]]
        p = torch.stack([ops.products(*each) for each in zip(dy, x, weights, strict=True)])
        all_reduce_(p, ctx.build.tp).wait()
        each = zip(dy, x, weights, means, p, norms, strict=True)
        (dq, dwq), (dk, dwk) = [ops.scaled_backward(*of, norm.features, norm.eps) for *of, norm in each]
        return None, None, None, dq, dk, dwq, dwk


def _exact_norms(q_norm: FullNorm, k_norm: FullNorm, q: Tensor, k: Tensor, exact: Slices) -> tuple[Tensor, Tensor]:
    """Slice by slice; of copies the first alone counts, since a part of a gradient is rounded otherwise."""
    norms = q_norm, k_norm
    parts = [[x.flatten(-2) for x in cut(x, min(exact.here, x.shape[2]), 2)] for x in (q, k)]
    mine = [
        tree_sum([mean_square(x, norm.features) for x in each]) * (norm.copies * norm.first)
        for norm, each in zip(norms, parts, strict=True)
    ]
    made = []
    for whole, norm, each, mean in zip((q, k), norms, parts, all_reduce(torch.stack(mine), exact.tp), strict=True):
        n = len(each)
        of = zip(each, spread(mean, n), cut(norm.weight, n, 0), strict=True)
        made.append(join([scaled(*one, norm.eps) for one in of], 2).view(whole.shape))
    return made[0], made[1]
