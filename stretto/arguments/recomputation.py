"""Settings of what the backward computes once more instead of keeping it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from stretto.arguments.setting import local_setting, setting

PartName = Literal["norms", "activation", "attention", "projections"]
USUAL: Final[tuple[PartName, ...]] = ("norms", "activation")
"""What `selective` computes once more unless it is said: what costs next to nothing."""

_UNITS: Final = MappingProxyType({"": 1, "K": 1, "M": 2, "G": 3, "T": 4})


@dataclass(frozen=True)
class Recomputation:
    """What of activations is kept from forward to backward."""

    recompute: Literal["none", "selective", "block", "offload"] = setting(
        "none",
        "what the backward computes once more instead of keeping it, to the same bits; selective: `recompute_parts`, "
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


def bytes_of(size: str) -> int:
    """Of `20GB` (10^9), `20GiB` (2^30). Raises ValueError for what is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B?", size.strip(), re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        raise ValueError(f"{size!r} is no size: say 20GB, 512MiB")
    unit = found[2].upper()
    scale = 1 if not unit else (1024 if found[3] else 1000) ** _UNITS[unit]
    return int(float(found[1]) * scale)
