"""Settings of what the backward recomputes instead of keeping it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from stretto.arguments.setting import local_setting, setting

PartName = Literal["norms", "activation", "attention", "projections"]
USUAL: Final[tuple[PartName, ...]] = ("norms", "activation")
"""What `selective` recomputes unless it is said: what costs next to nothing."""


@dataclass(frozen=True)
class Recomputation:
    """What of activations is kept from forward to backward."""

    recompute: Literal["none", "selective", "block", "offload"] = setting(
        "none",
        "what the backward recomputes instead of keeping it, to the same bits; selective: `recompute_parts`, "
        "by default outputs of norms and activation functions; block: all but what enters each block; offload: the "
        "same, and that waits in the host's memory",
    )
    recompute_parts: tuple[PartName, ...] = local_setting(
        USUAL,
        "with selective: norms, activation: their outputs; attention: its output, from queries, keys and values; "
        "projections: queries, keys and values and the inner features, from what their matrices take",
    )
    recompute_layers: int | None = local_setting(
        None, "with selective or block: so many layers of each stage, the first; unset: all", unit="layers", at_least=1
    )
    activation_budget: str | None = local_setting(
        None,
        "a rank keeps activations of at most this size, as in 20GB or 512MiB: layer by layer what is recomputed costs "
        "least by a cost model of GPUs; `stretto explain` shows the choice",
    )
