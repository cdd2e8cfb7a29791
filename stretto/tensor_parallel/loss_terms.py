"""What is minimized beside cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LossTerms:
    """What is minimized beside -log softmax(x)[label] of each token, with lse = log sum exp x.

    `smoothing` e gives the label 1 - e of the probability and each of the `vocab` words e / vocab (Szegedy et al.,
    "Rethinking the Inception architecture", 2016): lse - (1 - e) x[label] - e mean(x). `z` adds z lse^2, which keeps
    logits from drifting (Chowdhery et al., "PaLM", 2022). A token whose label is `ignore` counts for nothing.
    """

    smoothing: float = 0.0
    z: float = 0.0
    vocab: int = 0
    ignore: int | None = None


PLAIN = LossTerms()
