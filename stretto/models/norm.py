"""Norms over the hidden dimension, over the features of one head, and over those of all heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stretto.arguments.schema import ModelConfig
from stretto.collectives import all_reduce
from stretto.ordered import tree_sum
from stretto.params import Init, ParamSpec, Shard
from stretto.tensor_parallel import Build, Lazy, Pointwise, WithResidual, declare_on, replicated
from stretto.tensor_parallel.exact import Slices, cut, join, spread

ONES, ZEROS = Init(mean=1.0), Init()


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, as `op` says, and a way past it: [s(/t), b, h] -> twice the same.

    Whoever needs no way past takes `output` alone, or `now`.
    """

    def __init__(self, hidden: int, op: Pointwise, build: Build, *, bias: bool, init: Init = ONES) -> None:
        super().__init__()
        self.op = op
        first, zeros = (replicated((hidden,), i, sequence_parallel=build.sequence_parallel) for i in (init, ZEROS))
        self.weight = declare_on(self, "weight", first, build)
        self.bias = declare_on(self, "bias", zeros, build) if bias else None

    def forward(self, x: Tensor) -> WithResidual:
        return self.op.with_residual(x, *self._affine)

    def now(self, x: Tensor) -> Tensor:
        """The output alone, as a tensor."""
        return self.op.now(x, *self._affine)

    @property
    def _affine(self) -> tuple[nn.Parameter, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


class HeadNorm(nn.Module):
    """RMSNorm over the features of one head, as in Qwen3; its weight is shared by all heads.

    Each rank applies it to its own heads, so the gradient of the weight is a part on every tensor-parallel rank.
    """

    def __init__(self, dim: int, op: Pointwise, build: Build, *, init: Init = ONES) -> None:
        super().__init__()
        self.op = op
        spec = ParamSpec((dim,), init, sum_grad=("tp",), weight_decay=False)
        self.weight = declare_on(self, "weight", spec, build)

    def forward(self, x: Tensor) -> Tensor:
        return self.op.now(x, self.weight)


class LatentNorm(nn.Module):
    """RMSNorm over a latent, which every rank has whole and uses for its own heads: a part of the gradient each."""

    def __init__(self, dim: int, op: Pointwise, build: Build, *, init: Init = ONES) -> None:
        super().__init__()
        self.op, self.dim, self.ranks = op, dim, build.tp.size
        spec = ParamSpec((dim,), init, weight_decay=False, sum_grad=("tp",))
        self.weight = declare_on(self, "weight", spec, build)

    def forward(self, x: Tensor) -> Tensor | Lazy:
        return self.op(x, self.weight)


class FullNorm(nn.Module):
    """RMSNorm over the features of all heads together, as in OLMo 2: [s, b, heads/t, d] -> the same.

    Each rank has its heads and their weights; `squares` are summed over the tensor-parallel ranks by the caller.
    Where `copies` ranks hold the same heads each has a part of their gradient, and counts for a part of the sum.
    """

    def __init__(self, heads: int, dim: int, eps: float, build: Build, *, copies: int = 1) -> None:
        super().__init__()
        self.full, self.eps, self.copies = heads * dim, eps, copies
        self.first = build.tp.rank % copies == 0
        held = Shard("tp", 0, copies=copies)
        sums = ("tp",) if copies > 1 else ()
        spec = ParamSpec((heads * dim,), ONES, shard=(held,), sum_grad=sums, weight_decay=False)
        self.weight = declare_on(self, "weight", spec, build)

    def squares(self, x: Tensor) -> Tensor:
        """This rank's share [s, b] of the mean square, in fp32 or wider."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return wide.square().sum((-2, -1)) / (self.full * self.copies)

    def forward(self, x: Tensor, mean_square: Tensor) -> Tensor:
        return self.scaled(x, mean_square, self.weight.view(x.shape[-2:]))

    def scaled(self, x: Tensor, mean_square: Tensor, weight: Tensor) -> Tensor:
        """Some of the heads, with their weights [heads, d]."""
        scale = torch.rsqrt(mean_square + self.eps)[..., None, None]
        return (x * scale * weight).to(x.dtype)


def full_norms(q_norm: FullNorm, k_norm: FullNorm, q: Tensor, k: Tensor, build: Build) -> tuple[Tensor, Tensor]:
    """Queries and keys normed, each over all heads: one small all-reduce, and one in the backward."""
    if build.exact is not None:
        return _exact_norms(q_norm, k_norm, q, k, build.exact)
    mine = torch.stack([q_norm.squares(q), k_norm.squares(k)])
    both = mine if build.tp.size == 1 else all_reduce(mine, build.tp)
    return q_norm(q, both[0]), k_norm(k, both[1])


def _exact_norms(q_norm: FullNorm, k_norm: FullNorm, q: Tensor, k: Tensor, exact: Slices) -> tuple[Tensor, Tensor]:
    """The same slice by slice; of copies the first alone counts, since a part of a gradient is rounded otherwise."""
    norms = q_norm, k_norm
    parts = [cut(x, min(exact.here, x.shape[2]), 2) for x in (q, k)]
    mine = [
        tree_sum([norm.squares(x) for x in each]) * (norm.copies * norm.first)
        for norm, each in zip(norms, parts, strict=True)
    ]
    made = []
    for norm, each, mean_square in zip(norms, parts, all_reduce(torch.stack(mine), exact.tp), strict=True):
        n = len(each)
        weights = cut(norm.weight.view(-1, each[0].shape[-1]), n, 0)
        made.append(join([norm.scaled(*of) for of in zip(each, spread(mean_square, n), weights, strict=True)], 2))
    return made[0], made[1]


def norm(config: ModelConfig, build: Build, op: Pointwise) -> Norm:
    """The norm that the config names, over the hidden dimension."""
    return Norm(config.hidden, op, build, bias=config.norm != "rms", init=first_weight(config))


def first_weight(config: ModelConfig) -> Init:
    """Initial weights of an RMSNorm: it begins by multiplying with one."""
    return ZEROS if config.norm_zero_centered else ONES
