"""Embedding, head and loss with the vocabulary cut along the tensor-parallel axis.

The vocabulary need not divide: chunks are padded in storage, and padding takes no part in anything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stretto.collectives import all_reduce, max_reduce
from stretto.params import Init, ParamSpec, Shard
from stretto.tensor_parallel.build import Build
from stretto.tensor_parallel.layers import declare_on
from stretto.tensor_parallel.mappings import enter, leave
from stretto.world import Axis

_MULTIPLE = 8  # rows of a chunk: matrix units want sizes that are multiples of 8 in bf16


def vocab_spec(vocab: int, hidden: int, init: Init, *, tied: bool, name: str = "") -> ParamSpec:
    """The spec of a [vocab, hidden] matrix; a tied one is held, and gets gradients, on both end stages."""
    return ParamSpec(
        (vocab, hidden),
        init,
        shard=(Shard("tp", 0, multiple=_MULTIPLE),),
        sum_grad=("embed",) if tied else (),
        name=name,
    )


class VocabParallelEmbedding(nn.Module):
    """Rows of the embedding for tokens [b, s] -> [s(/t), b, h]; each rank looks up what its rows cover."""

    def __init__(
        self,
        spec: ParamSpec,
        build: Build,
    ) -> None:
        super().__init__()
        self.tp, self.sequence_parallel = build.tp, build.sequence_parallel
        self.start, self.rows = _rows(spec, build.tp)
        self.weight = declare_on(self, "weight", spec, build)

    def forward(self, tokens: Tensor) -> Tensor:
        local, mine = _localise(tokens.t(), self.start, self.rows)
        x = F.embedding(local, self.weight) * mine.unsqueeze(-1)
        return leave(x, self.tp, sequence_parallel=self.sequence_parallel)


class VocabParallelHead(nn.Module):
    """Logits [s, b, V/t] of activations [s(/t), b, h]; padding gets minus infinity.

    `weight` is the embedding's when it is tied and lives on the same stage.
    """

    def __init__(
        self,
        spec: ParamSpec,
        build: Build,
        weight: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.tp, self.sequence_parallel = build.tp, build.sequence_parallel
        self.start, self.rows = _rows(spec, build.tp)
        self.weight = declare_on(self, "weight", spec, build) if weight is None else weight

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(enter(x, self.tp, sequence_parallel=self.sequence_parallel), self.weight)
        if self.rows < self.weight.shape[0]:
            padding = torch.arange(self.weight.shape[0], device=x.device) >= self.rows
            logits = logits.masked_fill(padding, -torch.inf)
        return logits

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each token, in nats: [s(/t), b, h], labels [b, s] -> [s, b], at least fp32."""
        return vocab_parallel_cross_entropy(self(x), labels.t(), self.tp, start=self.start, rows=self.rows)


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, tp: Axis, *, start: int, rows: int) -> Tensor:
    """-log softmax(logits)[label]: logits [s, b, V/t] with `rows` valid ones from entry `start` on, labels [s, b].

    Only three numbers per token cross the axis: the maximum, the sum of exponentials, the label's logit.
    """
    loss: Tensor = _CrossEntropy.apply(logits, labels, tp, start, rows)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, tp: Axis, start: int, rows: int) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        shifted = wide - max_reduce(wide.amax(-1), tp).unsqueeze(-1)
        local, mine = _localise(labels, start, rows)
        # Where another rank holds the label this rank's logit may be minus infinity: choose, do not multiply.
        label = torch.where(mine, shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1), 0.0)
        exps = shifted.exp_()
        sums = all_reduce(torch.stack([exps.sum(-1), label]), tp)
        ctx.save_for_backward(exps.div_(sums[0].unsqueeze(-1)), local, mine)
        ctx.dtype = logits.dtype
        return sums[0].log() - sums[1]

    @staticmethod
    @once_differentiable  # the softmax is saved without its history
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
        softmax, local, mine = ctx.saved_tensors
        grad = softmax * dy.unsqueeze(-1)
        grad.scatter_add_(-1, local.unsqueeze(-1), -(dy * mine).unsqueeze(-1))
        return grad.to(ctx.dtype), None, None, None, None


def _rows(spec: ParamSpec, tp: Axis) -> tuple[int, int]:
    block = spec.block({"tp": tp})
    return block.offsets[0], block.shape[0]


def _localise(ids: Tensor, start: int, rows: int) -> tuple[Tensor, Tensor]:
    """Row of each id on this rank (0 where it is another's) and whether it is this rank's."""
    mine = (ids >= start) & (ids < start + rows)
    return (ids - start) * mine, mine
