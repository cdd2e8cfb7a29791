"""Cross-entropy over a vocabulary cut along the tensor-parallel axis, of logits or of the head that makes them.

The head's own loss never holds all logits: it takes some rows of tokens at a time and makes their gradient at once
(as in Hsu et al., "Liger Kernel", 2024), since 16,384 tokens by 131,072 words in fp32 are 8 GiB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stretto.collectives import all_reduce, all_reduce_max
from stretto.estimate.logits import rows_at_once
from stretto.ordered import tree_sum
from stretto.tensor_parallel import loss_formulas as formulas
from stretto.tensor_parallel.build import Accumulators, Build
from stretto.tensor_parallel.loss_formulas import Place
from stretto.tensor_parallel.loss_terms import PLAIN as PLAIN
from stretto.tensor_parallel.loss_terms import LossTerms as LossTerms
from stretto.tensor_parallel.sliced_gemms import HeadGemms
from stretto.world import Axis


class Steps(NamedTuple):
    """From logits to losses, between what crosses the axis."""

    statistics: Callable[..., tuple[Tensor, ...]]
    shares: Callable[..., Tensor]
    losses_: Callable[..., None]


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, tp: Axis, *, start: int, rows: int, terms: LossTerms = PLAIN
) -> Tensor:
    """Losses [s, b], those of `terms`: logits [s, b, V/t] with `rows` valid ones from entry `start` on, labels [s, b].

    Only three numbers per token cross the axis: the maximum, the sum of exponentials, the label's logit; with smoothing
    the sum of the logits, too. Columns of padding get a gradient of exactly zero, whatever they hold.
    """
    loss: Tensor = _CrossEntropy.apply(logits, labels, tp, start, rows, terms)  # type: ignore[no-untyped-call]
    return loss


class HeadLoss:
    """sum over tokens of weight * loss, for words `start`..`start + rows` on this rank.

    At most `limit` bytes of logits exist at once (one row of tokens at least; None: what `rows_at_once` says).
    Accumulators get the weight's gradient in the forward, so that none waits for the backward: that must begin at the
    loss itself. Where it begins at a multiple of it, the gradient of x is NaN. A weight that wants no gradient gets
    none.
    With `softcap` c the logits are c tanh(x W^T / c). Where no gradient is recorded the loss is that of an evaluation,
    cross-entropy without smoothing and z. Of an exact build the words are taken slice by slice.
    """

    def __init__(
        self,
        build: Build,
        start: int,
        rows: int,
        limit: int | None = None,
        *,
        softcap: float | None = None,
        terms: LossTerms = PLAIN,
    ) -> None:
        self.tp, self.start, self.rows, self.limit = build.tp, start, rows, limit
        self.gemms = HeadGemms(None if build.exact is None else build.exact.here)
        self.accumulators = build.accumulators
        self.terms, self.plain = terms, replace(terms, smoothing=0.0, z=0.0)
        self._steps = {
            t: Steps(*map(build.fuse, (_with(formulas.statistics, cap=softcap, smoothing=t.smoothing), *_after(t))))
            for t in (self.terms, self.plain)
        }
        self.prepare, self.weighted = build.fuse(partial(formulas.prepare, terms=terms)), build.fuse(formulas.weighted)
        self.gradient = build.fuse(
            _with(formulas.gradient_, cap=softcap, smoothing=terms.smoothing, z=terms.z, vocab=terms.vocab)
        )

    def __call__(self, x: Tensor, weight: nn.Parameter, labels: Tensor, weights: Tensor) -> Tensor:
        """[] in fp64: x [s, b, h], weight [V/t, h] (padded), labels [s, b], weights [s, b]."""
        keep = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        loss: Tensor = _HeadLoss.apply(x, weight, labels, weights, self, keep)  # type: ignore[no-untyped-call]
        return loss

    def of(
        self,
        logits: Sequence[Tensor],
        places: Sequence[Place],
        labels: Tensor,
        losses: Tensor,
        *,
        trained: bool,
    ) -> tuple[Tensor, Tensor]:
        """Of logits [.., V/t] in slices what `gradient` needs besides them; their `losses` [..] are filled in."""
        terms = self.terms if trained else self.plain
        return _loss(logits, places, self.tp, labels, losses, self._steps[terms])

    def places(self, weight: Tensor, labels: Tensor) -> list[Place]:
        """Of labels [s, b], for each slice of the logits: contiguous."""
        return formulas.places(labels.contiguous(), self.slices(weight))

    def slices(self, weight: Tensor) -> tuple[tuple[int, int], ...]:
        """The first word of each slice, and how many it has."""
        words = self.words(weight)
        return tuple((self.start + sum(words[:n]), here) for n, here in enumerate(words))

    def words(self, weight: Tensor) -> list[int]:
        """Of each slice, without padding."""
        words = weight.shape[0] // self.gemms.slices
        return [min(max(0, self.rows - n * words), words) for n in range(self.gemms.slices)]

    def chunk(self, x: Tensor, weight: Tensor) -> int:
        """Rows of the sequence that are taken at a time."""
        words = weight.shape[0] * (self.tp.size if self.gemms.exact else 1)  # for every tp alike
        return rows_at_once(x.shape[0], x.shape[1], words, x.element_size(), self.limit)

    def pieces(self, x: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor, list[Tensor], list[Tensor]]]:
        """A piece of the sequence at a time: which, its rows [n, h], and their logits [n, V/t] in the same memory.

        They come in slices, and once more as [.., b, words] without padding. What the caller leaves in the logits of
        padding is zero.
        """
        size = min(self.chunk(x, weight), x.shape[0])
        weights = self.gemms.parts(weight)
        words = weights[0].shape[0]
        memory = [torch.empty((size * x.shape[1], words), dtype=x.dtype, device=x.device) for _ in weights]
        for first in range(0, x.shape[0], size):
            part = slice(first, first + size)
            rows = x[part].flatten(0, 1)
            flat = [torch.mm(rows, w.t(), out=m[: rows.shape[0]]) for w, m in zip(weights, memory, strict=True)]
            valid = []
            for logits, here in zip(flat, self.words(weight), strict=True):
                logits[:, here:].zero_()  # padding takes no part
                valid.append(logits.view(*x[part].shape[:2], -1)[..., :here])
            yield part, rows, flat, valid


class _HeadLoss(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: nn.Parameter, labels: Tensor, weights: Tensor, of: HeadLoss, keep: bool
    ) -> Tensor:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if keep else x
        # What labels and weights say, for all pieces at once.
        wide = torch.promote_types(x.dtype, torch.float32)
        dy, *places = of.prepare(labels, weights, slices=of.slices(weight), dtype=wide)
        losses = torch.empty(labels.shape, dtype=wide, device=x.device)

        def through(dw: Tensor, first_microbatch: bool) -> None:
            """All rows, a piece at a time: their losses, and where gradients are kept those, dW added to `dw`."""
            for part, rows, grads, valid in of.pieces(x, weight):
                here = [(local[part], mine[part]) for local, mine in zip(places[::2], places[1::2], strict=True)]
                known = of.of(valid, here, labels[part], losses[part], trained=keep)
                if keep:
                    for logits, place in zip(valid, here, strict=True):
                        of.gradient(logits, *place, *known, dy[part])
                    of.gemms.input_gradient(grads, weight, dx[part].flatten(0, 1))
                    if trained:
                        of.gemms.add(dw, first_microbatch and part.start == 0, grads, rows)

        trained = keep and weight.requires_grad
        ctx.param, ctx.accumulators = weight, of.accumulators if trained else None
        if trained and of.accumulators is not None:  # no other copy of it waits for the backward
            of.accumulators.add_in_forward(weight, through)
            ctx.save_for_backward(dx)
            return of.weighted(losses, weights)  # type: ignore[no-any-return]
        dw = torch.empty_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) if trained else weight
        through(dw, True)
        if keep:
            ctx.save_for_backward(dx, *([dw] if trained else []))
        return of.weighted(losses, weights)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        dx, *made = ctx.saved_tensors
        into: Accumulators | None = ctx.accumulators
        if into is None:
            dw = (made[0] * scale.to(made[0].dtype)).to(ctx.param.dtype) if made else None
            return dx * scale.to(dx.dtype), dw, None, None, None, None
        into.complete(ctx.param)
        # The weight's gradient is that of the loss itself. Of a multiple it would be wrong, which must not stay unseen.
        return dx * torch.where(scale == 1, 1.0, torch.nan).to(dx.dtype), None, None, None, None, None


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, tp: Axis, start: int, rows: int, terms: LossTerms) -> Tensor:
        if terms.smoothing and terms.vocab <= 0:
            raise ValueError(f"smoothing={terms.smoothing} with vocab={terms.vocab}: LossTerms(vocab=) is the whole's")
        place = formulas.localise(labels, start, rows)
        loss = torch.empty(labels.shape, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
        steps = Steps(_with(formulas.statistics, smoothing=terms.smoothing), *_after(terms))
        highest, exps = _loss([logits[..., :rows]], [place], tp, labels, loss, steps)
        ctx.rows, ctx.terms = rows, terms
        ctx.save_for_backward(logits, labels, *place, highest, exps)
        return loss

    @staticmethod
    @once_differentiable  # it takes logits and loss for constants
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        logits, labels, local, mine, highest, exps = ctx.saved_tensors
        valid, t, dy = logits[..., : ctx.rows], ctx.terms, formulas.counted(dy, labels, ctx.terms)
        dx = formulas.gradient(valid, local, mine, highest, exps, dy, smoothing=t.smoothing, z=t.z, vocab=t.vocab)
        return F.pad(dx, (0, logits.shape[-1] - ctx.rows)), None, None, None, None, None


def _with(function: Any, **bound: Any) -> Any:
    """The function with what of it is not at its default: what is not used costs no operation."""
    used = {name: value for name, value in bound.items() if value}
    return partial(function, **used) if used else function


def _after(terms: LossTerms) -> tuple[Callable[..., Tensor], Callable[..., None]]:
    """What follows the statistics."""
    return formulas.shares, partial(formulas.losses_, terms=terms)


def _loss(
    logits: Sequence[Tensor], places: Sequence[Place], tp: Axis, labels: Tensor, losses: Tensor, steps: Steps
) -> tuple[Tensor, Tensor]:
    """The highest logit and the sum of exponentials over all ranks, of logits [.., V/t] in slices; fills the losses."""
    found = [steps.statistics(x, *place) for x, place in zip(logits, places, strict=True)]
    highest = all_reduce_max(reduce(torch.maximum, (top for top, *_ in found)), tp)
    summed = [
        steps.shares(*of_slice, mine, highest, words=x.shape[-1])
        for x, (_, mine), of_slice in zip(logits, places, found, strict=True)
    ]
    sums = all_reduce(tree_sum(summed), tp)
    steps.losses_(losses, sums, highest, labels)
    return highest, sums[0]
