"""Settings of fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stretto.arguments.setting import setting

TargetName = Literal["q", "k", "v", "o", "gate", "up", "down"]


@dataclass(frozen=True)
class TuningConfig:
    """What of a model is trained, where not all of it is."""

    freeze: tuple[str, ...] = setting(
        (), "parameters that stay as they are, by name: * stands for anything, as in model.embed_tokens.*"
    )
    lora_rank: int = setting(
        0,
        "train low-rank adapters of this rank alone, and no other parameter; 0: no adapters",
        at_least=0,
        at_most=2**14,
    )
    lora_alpha: float = setting(16.0, "what an adapter adds is multiplied by lora_alpha / lora_rank", above=0)
    lora_dropout: float = setting(0.0, "share of an adapter's input that falls away in training", at_least=0, below=1)
    lora_targets: tuple[TargetName, ...] = setting(
        ("q", "k", "v", "o"),
        "matrices with an adapter: of attention q, k, v and o, of the feed-forward gate, up and down",
    )
