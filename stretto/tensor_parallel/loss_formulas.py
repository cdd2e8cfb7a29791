"""Cross-entropy as formulas: what is computed of each token, between what crosses the tensor-parallel axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stretto.tensor_parallel.loss_terms import LossTerms

Place = tuple[Tensor, Tensor]
"""Of each label: its row among some words, and whether it is one of them."""


def counted(dy: Tensor, labels: Tensor, terms: LossTerms) -> Tensor:
    """It, and zero where the label is to be ignored."""
    return dy if terms.ignore is None else dy.masked_fill(labels == terms.ignore, 0.0)


def shares(top: Tensor, exps: Tensor, label: Tensor, *more: Tensor, words: int) -> Tensor:
    """[2, ..], with smoothing [3, ..]: what a slice's statistics add to the sums over all words, with what its label is
    among and the highest logit of all as the last two arguments."""
    *below, mine, highest = more
    # A rank without words has minus infinity for its highest logit and adds nothing.
    of_words = [exps * (top - highest).exp(), label - highest * mine]
    return torch.stack([*of_words, *(each + words * (top - highest) if words else each for each in below)])


def losses_(losses: Tensor, sums: Tensor, highest: Tensor, labels: Tensor, terms: LossTerms) -> None:
    """Fill in the losses [..] that follow from sums over all words [2, ..], with smoothing [3, ..]."""
    exps, label, *below = sums
    log = exps.log()
    if terms.smoothing:
        loss = log - (1 - terms.smoothing) * label - terms.smoothing / terms.vocab * below[0]
    else:
        loss = log - label
    if terms.z:
        loss = loss + terms.z * (log + highest).square()
    losses.copy_(counted(loss, labels, terms))


def weighted(losses: Tensor, weights: Tensor) -> Tensor:
    """[] in fp64: their sum."""
    return (losses.double() * weights).sum()


def prepare(
    labels: Tensor, weights: Tensor, *, slices: tuple[tuple[int, int], ...], dtype: torch.dtype, terms: LossTerms
) -> tuple[Tensor, ...]:
    """Of all labels and weights [s, b], contiguous: what the gradient of each counts for, then its place in each slice
    of the words, two tensors each."""
    labels, weights = labels.contiguous(), weights.contiguous()
    return counted(weights.to(dtype), labels, terms), *(x for place in places(labels, slices) for x in place)


def places(labels: Tensor, slices: Sequence[tuple[int, int]]) -> list[Place]:
    """Of labels, in each slice of the words, by its first word and how many it has."""
    return [localise(labels, start, words) for start, words in slices]


def statistics(
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


def gradient(
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


def gradient_(
    logits: Tensor, local: Tensor, mine: Tensor, highest: Tensor, exps: Tensor, dy: Tensor, **bound: Any
) -> None:
    """`gradient` in the place of the logits: two tensors of that size are much."""
    logits.copy_(gradient(logits, local, mine, highest, exps, dy, **bound))


def localise(ids: Tensor, start: int, rows: int) -> tuple[Tensor, Tensor]:
    """Row of each id on this rank (0 where it is another's) and whether it is this rank's."""
    mine = (ids >= start) & (ids < start + rows)
    return (ids - start) * mine, mine
