"""Settings of what is minimized."""

from __future__ import annotations

from dataclasses import dataclass

from stretto.arguments.setting import setting


@dataclass(frozen=True)
class LossConfig:
    """What is minimized in training; an evaluation is cross-entropy alone."""

    label_smoothing: float = setting(
        0.0,
        "this share of the probability of each label goes to all words of the vocabulary alike, in training; the loss "
        "of a step is that with it",
        at_least=0,
        below=1,
    )
    z_loss: float = setting(
        0.0,
        "so many times the square of each token's log of summed exponentials is added to the loss in training, which "
        "keeps logits from drifting (PaLM: 1e-4)",
        at_least=0,
    )
