"""From a router's logits to the weights of the chosen experts, and back: a formula each way, without autograd.

A router is small, so what it costs is launches: by autograd's nodes two dozen forward and back. A backward counts what
its microbatch saw, too: it runs once, also where its forward runs twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Gates(NamedTuple):
    """`kind`: softmax, sigmoid or softmax-top-k. `balance` and `z` are the coefficients of the two losses, over the
    tokens of the global batch: of sum_e share_e chance_e, and of logsumexp^2."""

    kind: str
    renormalize: bool
    scale: float
    balance: float
    z: float


def ranked(logits: Tensor, bias: Tensor | None, gates: Gates) -> Tensor:
    """[n, E]: the larger, the sooner an expert is chosen."""
    scores = _scores(logits, gates)
    return scores if bias is None else scores + bias


def weights(logits: Tensor, experts: Tensor, gates: Gates) -> Tensor:
    """[n, K] of logits [n, E] and the chosen `experts` [n, K]."""
    return _chosen(logits, experts, gates)[0] * gates.scale


def gradient(
    dweights: Tensor,
    logits: Tensor,
    experts: Tensor,
    before: Tensor,
    real: Tensor | None,
    kept: Tensor | None,
    gates: Gates,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of logits [n, E], that of both losses in it, and what was `seen`.

    `before` [E] are the assignments of the last step.
    """
    number = logits.shape[1]
    hits = experts[..., None] == torch.arange(number, device=logits.device)  # [n, K, E]
    some, scores = _some(logits, real), _scores(logits, gates)
    total = scores.sum(-1, keepdim=True) if gates.kind == "sigmoid" else 1.0

    chosen, factor = _chosen(logits, experts, gates)
    d = dweights * gates.scale
    if factor is not None:
        d = (d - (d * chosen).sum(-1, keepdim=True)) * factor
    of_chosen = (hits * d[..., None]).sum(1)
    dscores = torch.zeros_like(logits) if gates.kind == "softmax-top-k" else of_chosen
    if gates.balance:
        share = before.to(logits.dtype) / before.sum().clamp(min=1) * gates.balance
        mean = (scores * share).sum(-1, keepdim=True) / total if gates.kind == "sigmoid" else 0.0
        dscores = dscores + (share - mean) / total * some
    if gates.kind == "sigmoid":
        dlogits = dscores * scores * (1 - scores)
    else:
        dlogits = scores * (dscores - (scores * dscores).sum(-1, keepdim=True))
    if gates.kind == "softmax-top-k":
        dlogits = dlogits + of_chosen
    if gates.z:
        dlogits = dlogits + 2 * gates.z * torch.logsumexp(logits, -1, keepdim=True) * logits.softmax(-1) * some
    return dlogits, *seen(logits, experts, real, kept, gates)


def seen(
    logits: Tensor, experts: Tensor, real: Tensor | None, kept: Tensor | None, gates: Gates
) -> tuple[Tensor, Tensor]:
    """Assignments of each expert, and how many of them were dropped, [2, E] int64; sums over the tokens [E + 1] in
    fp64, of probabilities and of logsumexp^2.

    `real` [n] says which rows are tokens, `kept` [n, K] which assignments are not dropped; None: all.
    """
    hits = experts[..., None] == torch.arange(logits.shape[1], device=logits.device)
    counted = hits if real is None else hits & real[:, None, None]
    counts = counted.sum((0, 1))
    dropped = torch.zeros_like(counts) if kept is None else (counted & ~kept[..., None]).sum((0, 1))
    some, scores = _some(logits, real), _scores(logits, gates)
    if gates.kind == "sigmoid":
        scores = scores / scores.sum(-1, keepdim=True)
    squares = (torch.logsumexp(logits, -1, keepdim=True).square() * some).sum(0, dtype=torch.float64)
    return torch.stack([counts, dropped]), torch.cat([(scores * some).sum(0, dtype=torch.float64), squares])


def _some(logits: Tensor, real: Tensor | None) -> Tensor:
    """[n, 1]: 1 of a token, else 0."""
    return torch.ones_like(logits[:, :1]) if real is None else real[:, None].to(logits.dtype)


def _scores(logits: Tensor, gates: Gates) -> Tensor:
    return logits.sigmoid() if gates.kind == "sigmoid" else logits.softmax(-1)


def _chosen(logits: Tensor, experts: Tensor, gates: Gates) -> tuple[Tensor, Tensor | None]:
    """[n, K]: the weights before they are scaled; and, where they add up to one, the factor of their gradient."""
    if gates.kind == "softmax-top-k":
        chosen = logits.gather(1, experts).softmax(-1)
        return chosen, chosen
    chosen = _scores(logits, gates).gather(1, experts)
    if not gates.renormalize:
        return chosen, None
    total = chosen.sum(-1, keepdim=True)
    if gates.kind == "sigmoid":
        total = total + 1e-20
    return chosen / total, 1 / total
