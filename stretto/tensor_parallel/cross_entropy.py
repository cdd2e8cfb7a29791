"""Cross-entropy over a vocabulary cut along the tensor-parallel axis, of logits or of the head that makes them.

The head's own loss never holds all logits: it takes some rows of tokens at a time and makes their gradient at once
(as in Hsu et al., "Liger Kernel", 2024), since 16,384 tokens by 131,072 words in fp32 are 8 GiB.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stretto.collectives import all_reduce, all_reduce_max
from stretto.estimate.logits import rows_at_once
from stretto.ordered import tree_sum
from stretto.tensor_parallel.build import Accumulators, Build, unfused
from stretto.tensor_parallel.loss_terms import PLAIN as PLAIN
from stretto.tensor_parallel.loss_terms import LossTerms as LossTerms
from stretto.tensor_parallel.sliced_gemms import HeadGemms
from stretto.world import Axis

Place = tuple[Tensor, Tensor]
"""Of each label: its row among some words, and whether it is one of them."""


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
        self.terms, self.plain = terms, LossTerms(ignore=terms.ignore)
        self._statistics = {e: build.fuse(_with(_statistics, cap=softcap, smoothing=e)) for e in (0.0, terms.smoothing)}
        self.gradient = build.fuse(
            _with(_gradient_, cap=softcap, smoothing=terms.smoothing, z=terms.z, vocab=terms.vocab)
        )

    def __call__(self, x: Tensor, weight: nn.Parameter, labels: Tensor, weights: Tensor) -> Tensor:
        """[] in fp64: x [s, b, h], weight [V/t, h] (padded), labels [s, b], weights [s, b]."""
        keep = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        loss: Tensor = _HeadLoss.apply(x, weight, labels, weights, self, keep)  # type: ignore[no-untyped-call]
        return loss

    def of(
        self, logits: Sequence[Tensor], labels: Tensor, *, trained: bool
    ) -> tuple[Tensor, list[Place], Tensor, Tensor]:
        """The loss [..] of logits [.., V/t] in slices, and what `gradient` needs besides these."""
        terms = self.terms if trained else self.plain
        return _losses(logits, self.places(logits, labels), self.tp, labels, self._statistics[terms.smoothing], terms)

    def places(self, logits: Sequence[Tensor], labels: Tensor) -> list[Place]:
        """Of the labels, for each slice of the logits."""
        found, start = [], self.start
        for part in logits:
            found.append(localise(labels, start, part.shape[-1]))
            start += part.shape[-1]
        return found

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
            for n, logits in enumerate(flat):
                here = min(max(0, self.rows - n * words), words)
                logits[:, here:].zero_()  # padding takes no part
                valid.append(logits.view(*x[part].shape[:2], -1)[..., :here])
            yield part, rows, flat, valid


class _HeadLoss(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: nn.Parameter, labels: Tensor, weights: Tensor, of: HeadLoss, keep: bool
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if keep else x

        def through(dw: Tensor, first_microbatch: bool) -> None:
            """All rows, a piece at a time: their loss, and where gradients are kept those, dW added to `dw`."""
            for part, rows, grads, valid in of.pieces(x, weight):
                loss, places, *known = of.of(valid, labels[part], trained=keep)
                total.add_((loss.double() * weights[part]).sum())
                if keep:
                    dy = counted(weights[part].to(loss.dtype), labels[part], of.terms)
                    for logits, place in zip(valid, places, strict=True):
                        of.gradient(logits, *place, *known, dy)
                    of.gemms.input_gradient(grads, weight, dx[part].flatten(0, 1))
                    if trained:
                        of.gemms.add(dw, first_microbatch and part.start == 0, grads, rows)

        trained = keep and weight.requires_grad
        ctx.param, ctx.accumulators = weight, of.accumulators if trained else None
        if trained and of.accumulators is not None:  # no other copy of it waits for the backward
            of.accumulators.add_in_forward(weight, through)
            ctx.save_for_backward(dx)
            return total
        dw = torch.empty_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) if trained else weight
        through(dw, True)
        if keep:
            ctx.save_for_backward(dx, *([dw] if trained else []))
        return total

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
        statistics = _with(_statistics, smoothing=terms.smoothing)
        place = localise(labels, start, rows)
        loss, _, highest, exps = _losses([logits[..., :rows]], [place], tp, labels, statistics, terms)
        ctx.rows, ctx.terms = rows, terms
        ctx.save_for_backward(logits, labels, *place, highest, exps)
        return loss

    @staticmethod
    @once_differentiable  # it takes logits and loss for constants
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        logits, labels, local, mine, highest, exps = ctx.saved_tensors
        valid, t, dy = logits[..., : ctx.rows], ctx.terms, counted(dy, labels, ctx.terms)
        dx = _gradient(valid, local, mine, highest, exps, dy, smoothing=t.smoothing, z=t.z, vocab=t.vocab)
        return F.pad(dx, (0, logits.shape[-1] - ctx.rows)), None, None, None, None, None


def _with(function: Any, **bound: Any) -> Any:
    """The function with what of it is not at its default: what is not used costs no operation."""
    used = {name: value for name, value in bound.items() if value}
    return partial(function, **used) if used else function


def counted(dy: Tensor, labels: Tensor, terms: LossTerms) -> Tensor:
    """It, and zero where the label is to be ignored."""
    return dy if terms.ignore is None else dy.masked_fill(labels == terms.ignore, 0.0)


def _losses(
    logits: Sequence[Tensor],
    places: list[Place],
    tp: Axis,
    labels: Tensor,
    statistics: Any = unfused,
    terms: LossTerms = PLAIN,
) -> tuple[Tensor, list[Place], Tensor, Tensor]:
    found = [statistics(x, *place) for x, place in zip(logits, places, strict=True)]
    highest = all_reduce_max(reduce(torch.maximum, (top for top, *_ in found)), tp)
    summed = []
    for x, (_, mine), (top, exps, label, *logit_sum) in zip(logits, places, found, strict=True):
        # A rank without words has minus infinity for its highest logit and adds nothing.
        terms_of = [exps * (top - highest).exp(), label - highest * mine]
        if terms.smoothing:
            rows = x.shape[-1]
            terms_of.append(logit_sum[0] + rows * (top - highest) if rows else logit_sum[0])
        summed.append(torch.stack(terms_of))
    exps, label, *logit_sum = all_reduce(tree_sum(summed), tp)
    log = exps.log()
    if terms.smoothing:
        loss = log - (1 - terms.smoothing) * label - terms.smoothing / terms.vocab * logit_sum[0]
    else:
        loss = log - label
    if terms.z:
        loss = loss + terms.z * (log + highest).square()
    return counted(loss, labels, terms), places, highest, exps


def _statistics(
    logits: Tensor, local: Tensor, mine: Tensor, cap: float | None = None, smoothing: float = 0.0
) -> tuple[Tensor, ...]:
    """Of this rank's words, in fp32 or wider: the highest logit, the sum of exponentials below it, the label's.

    With smoothing the sum of what the logits lie below the highest, too.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if cap is not None:
        wide = cap * torch.tanh(wide / cap)
    if logits.shape[-1] == 0:
        nothing = torch.zeros(logits.shape[:-1], dtype=wide.dtype, device=wide.device)
        return nothing - torch.inf, *[nothing] * (3 if smoothing else 2)
    top = wide.amax(-1)
    below = wide - top.clamp(min=torch.finfo(wide.dtype).min).unsqueeze(-1)
    exps = below.exp().sum(-1)
    # Where another rank holds the label this rank's logit may be minus infinity: choose, do not multiply.
    label = torch.where(mine, wide.gather(-1, local.unsqueeze(-1)).squeeze(-1), 0.0)
    return (top, exps, label, below.sum(-1)) if smoothing else (top, exps, label)


def _gradient(
    logits: Tensor,
    local: Tensor,
    mine: Tensor,
    highest: Tensor,
    exps: Tensor,
    dy: Tensor,
    cap: float | None = None,
    smoothing: float = 0.0,
    z: float = 0.0,
    vocab: int = 0,
) -> Tensor:
    """(softmax - target) * dy, in the dtype of the logits: the target is 1 at the label, or smoothed.

    Shifted by the highest and divided by the sum, not shifted by both at once: 10,000 + log 3 has no room in fp32.
    """
    wide = logits.to(exps.dtype)
    if cap is not None:
        bent = torch.tanh(wide / cap)
        wide, dy = cap * bent, dy.unsqueeze(-1) * (1 - bent.square())  # d tanh(x) = 1 - tanh(x)^2
    else:
        dy = dy.unsqueeze(-1)
    words = torch.arange(logits.shape[-1], device=logits.device)
    one = (words == local.unsqueeze(-1)) & mine.unsqueeze(-1)
    softmax = (wide - highest.unsqueeze(-1)).exp() / exps.unsqueeze(-1)
    if z:  # d (lse^2) = 2 lse softmax
        softmax = softmax * (1 + 2 * z * (exps.log() + highest)).unsqueeze(-1)
    target = one.to(wide.dtype)
    if smoothing:
        target = (1 - smoothing) * target + smoothing / vocab
    return ((softmax - target) * dy).to(logits.dtype)


def _gradient_(
    logits: Tensor, local: Tensor, mine: Tensor, highest: Tensor, exps: Tensor, dy: Tensor, **bound: Any
) -> None:
    """`_gradient` in the place of the logits: two tensors of that size are much."""
    logits.copy_(_gradient(logits, local, mine, highest, exps, dy, **bound))


def localise(ids: Tensor, start: int, rows: int) -> tuple[Tensor, Tensor]:
    """Row of each id on this rank (0 where it is another's) and whether it is this rank's."""
    mine = (ids >= start) & (ids < start + rows)
    return (ids - start) * mine, mine
