"""What is told of how a step routed its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RoutingRecord:
    """Where the tokens of a step went, over the whole global batch: a row for each layer with experts.

    `counts` are the assignments of each expert, `dropped` those beyond its capacity, `bias` what moves the choice after
    the step. `load` is the largest count over the mean, `entropy` 1 where all are equal and 0 where one expert has all,
    `lost` the share that was dropped, `balance` the balance loss before its coefficient (1 where all are equal), `z`
    the mean square of the router's logsumexp.
    """

    step: int
    layers: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    dropped: tuple[tuple[int, ...], ...]
    bias: tuple[tuple[float, ...], ...]
    load: tuple[float, ...]
    entropy: tuple[float, ...]
    lost: tuple[float, ...]
    balance: tuple[float, ...]
    z: tuple[float, ...]

    def rows(self) -> list[dict[str, Any]]:
        """An object for each layer."""
        names = ("counts", "dropped", "bias", "load", "entropy", "lost", "balance", "z")
        return [
            {"step": self.step, "layer": layer, **{name: getattr(self, name)[n] for name in names}}
            for n, layer in enumerate(self.layers)
        ]

    def figures(self) -> dict[str, float]:
        """Fields of a `StepRecord`: the worst layer, or the mean over them."""
        mean = len(self.layers)
        return {
            "expert_load": max(self.load),
            "expert_entropy": min(self.entropy),
            "expert_dropped": sum(self.lost) / mean,
            "expert_balance": sum(self.balance) / mean,
            "router_z": sum(self.z) / mean,
        }
