"""How a layer weighs its scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from stretto.arguments.schema import ModelConfig


@dataclass(frozen=True)
class Scores:
    """How a layer weighs what it attends to: q k^T times `scale` (None: 1/sqrt(d)), then c tanh(x/c) with `softcap` c.

    With a `window` a position attends to so many at most, itself the last of them.
    """

    scale: float | None = None
    softcap: float | None = None
    window: int | None = None

    @classmethod
    def of(cls, config: ModelConfig, layer: int) -> Scores:
        """Those of one layer of a model."""
        return cls(config.attention_scale, config.attention_softcap, config.window_of(layer))


PLAIN: Final = Scores()
"""Causal attention and nothing else."""
