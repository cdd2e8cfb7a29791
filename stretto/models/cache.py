"""Keys and values of positions that were computed before, so that a sample is drawn for the price of its last token."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class KeyValues:
    """Of all layers: [b, kv_heads, s, d] each. `length` positions are there; the next come after them."""

    length: int = 0
    _held: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def extended(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Those of a layer with the new ones behind them, which are kept."""
        if layer in self._held:
            k, v = (torch.cat([old, new], 2) for old, new in zip(self._held[layer], (k, v), strict=True))
        self._held[layer] = k, v
        return k, v
