"""Embedding and head with the vocabulary cut along the tensor-parallel axis.

The vocabulary need not divide: chunks are padded in storage, and padding takes no part in anything.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stretto.params import Init, ParamSpec, Shard
from stretto.tensor_parallel.build import Accumulators, Build
from stretto.tensor_parallel.cross_entropy import PLAIN, HeadLoss, LossTerms
from stretto.tensor_parallel.formulas import add_rows_
from stretto.tensor_parallel.layers import declare_on, expect
from stretto.tensor_parallel.loss_formulas import localise
from stretto.tensor_parallel.mappings import enter, leave
from stretto.tensor_parallel.token_losses import token_losses
from stretto.world import Axis

_MULTIPLE = 8  # rows of a chunk: matrix units want sizes that are multiples of 8 in bf16


def vocab_spec(vocab: int, hidden: int, init: Init, *, tied: bool = False, name: str = "") -> ParamSpec:
    """The spec of a [vocab, hidden] matrix; a tied one is held, and gets gradients, on both end stages."""
    return ParamSpec(
        (vocab, hidden),
        init,
        shard=(Shard("tp", 0, multiple=_MULTIPLE),),
        sum_grad=("embed",) if tied else (),
        elementwise=True,
        name=name,
    )


class VocabParallelEmbedding(nn.Module):
    """Rows of the embedding for tokens [b, s] -> [s(/t), b, h]; each rank looks up what its rows cover.

    `weight` is another module's on the same rank, which declares it.
    """

    def __init__(self, spec: ParamSpec, build: Build, weight: nn.Parameter | None = None) -> None:
        super().__init__()
        self.build = build
        spec = spec if build.exact is None else build.exact.words(spec)
        self.start, self.rows = _rows(spec, build.tp)
        self.weight = declare_on(self, "weight", spec, build) if weight is None else weight
        # A rank that is alone has all rows, and is spared a mask.
        self.look_up = build.fuse(_look_up) if build.tp.size > 1 else _look_up_all
        self.add_rows = build.fuse(add_rows_)
        expect(self.weight, build)

    def forward(self, tokens: Tensor) -> Tensor:
        local, mine = localise(tokens.t(), self.start, self.rows)
        if self.build.accumulators is None:
            x = self.look_up(self.weight, local, mine)
        else:
            x = _LookUp.apply(self.weight, local, mine, self)  # type: ignore[no-untyped-call]
        at = self.build
        x = leave(x, at.tp, sequence_parallel=at.sequence_parallel, overlap_with=at.overlap_with)
        return x if at.exact is None else x + 0.0  # one zero: a rank that is alone has not added those of others


class VocabParallelHead(nn.Module):
    """Logits [s, b, V/t] of activations [s(/t), b, h]; padding gets minus infinity.

    `weight` is the embedding's when it is tied and lives on the same stage. With `softcap` c
    a logit x is c tanh(x / c). `terms` are those of its losses, while gradients are recorded.
    """

    def __init__(
        self,
        spec: ParamSpec,
        build: Build,
        weight: nn.Parameter | None = None,
        softcap: float | None = None,
        terms: LossTerms = PLAIN,
    ) -> None:
        super().__init__()
        self.build, self.softcap = build, softcap
        spec = spec if build.exact is None else build.exact.words(spec)
        self.start, self.rows = _rows(spec, build.tp)
        self.weight = declare_on(self, "weight", spec, build) if weight is None else weight
        terms = replace(terms, vocab=spec.shape[0])
        self.measure = HeadLoss(build, self.start, self.rows, softcap=softcap, terms=terms)
        expect(self.weight, build)

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(enter(x, self.build.tp, sequence_parallel=self.build.sequence_parallel), self.weight)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.rows < self.weight.shape[0]:
            padding = torch.arange(self.weight.shape[0], device=x.device) >= self.rows
            logits = logits.masked_fill(padding, -torch.inf)
        return logits

    def loss(self, x: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Sum of weight times cross-entropy in nats, [] in fp64, over x [s(/t), b, h], labels and weights [b, s]."""
        at = self.build
        x = enter(x, at.tp, sequence_parallel=at.sequence_parallel, overlap_with=at.overlap_with)
        return self.measure(x, self.weight, labels.t(), weights.t())

    def losses(self, x: Tensor, labels: Tensor) -> Tensor:
        """The loss of each token [b, s], over x [s(/t), b, h], labels [b, s]: for weights that follow from it."""
        at = self.build
        x = enter(x, at.tp, sequence_parallel=at.sequence_parallel, overlap_with=at.overlap_with)
        return token_losses(x, self.weight, labels.t(), self.measure).t()


class _LookUp(Function):
    """Rows of the embedding, whose gradients are summed in fp32 or wider."""

    @staticmethod
    def forward(ctx: Any, weight: nn.Parameter, ids: Tensor, mine: Tensor, of: VocabParallelEmbedding) -> Tensor:
        ctx.param, ctx.of = weight, of
        ctx.save_for_backward(ids, mine)
        x: Tensor = of.look_up(weight.detach(), ids, mine)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None, None]:
        ids, mine = ctx.saved_tensors

        def write(total: Tensor, first_microbatch: bool) -> None:
            if first_microbatch:
                total.zero_()
            # What is compiled adds in any order, and a kernel written by hand in one.
            add = ctx.of.add_rows if total.is_cuda and total.dtype == torch.float32 else add_rows_
            if exact is None:
                add(total, dy, ids, mine)
                return
            for n, part in enumerate(total.chunk(exact.here)):
                local, here = localise(ids, n * part.shape[0], part.shape[0])
                add(part, dy, local, mine & here)

        exact = ctx.of.build.exact
        into: Accumulators = ctx.of.build.accumulators
        into.add(ctx.param, write)
        return None, None, None, None


def _look_up(weight: Tensor, ids: Tensor, mine: Tensor) -> Tensor:
    """Rows [s, b, h] of weight [n, h], of those ids that are this rank's, and zeros."""
    return F.embedding(ids, weight) * mine.unsqueeze(-1)


def _look_up_all(weight: Tensor, ids: Tensor, mine: Tensor) -> Tensor:
    del mine
    return F.embedding(ids, weight)


def _rows(spec: ParamSpec, tp: Axis) -> tuple[int, int]:
    block = spec.block({"tp": tp})
    return block.offsets[0], block.shape[0]
