"""Seconds by what takes them: of a step, and of the passes of a layer or a stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from stretto.estimate.amounts import Amounts

_WORDS: Final = MappingProxyType({"gemms": "GEMMs"})


@dataclass(frozen=True)
class StepTime(Amounts):
    """Seconds of a step on the rank that computes longest, by what takes them; they add up to it."""

    gemms: float = 0.0
    """Those of experts among them."""
    attention: float = 0.0
    elementwise: float = 0.0
    """Between GEMMs; rows of experts that move."""
    launches: float = 0.0
    """Gaps of the step, and what the host lacks to keep up."""
    recomputation: float = 0.0
    communication: float = 0.0
    """Not hidden, and what hidden communication takes from GEMMs."""
    optimizer: float = 0.0
    bubble: float = 0.0
    """Waiting for other stages."""

    @property
    def said(self) -> str:
        """Each part in milliseconds, in words."""
        return ", ".join(
            f"{_WORDS.get(name, name)} {1e3 * seconds:,.0f}" for name, seconds in vars(self).items() if seconds
        )


@dataclass(frozen=True)
class Passes:
    """Of a stage and microbatch: forward, gradients of inputs, and of weights."""

    forward: StepTime
    inputs: StepTime
    weights: StepTime

    @property
    def total(self) -> StepTime:
        """All three."""
        return self.forward + self.inputs + self.weights

    def times(self, n: float) -> Passes:
        """Of as many such layers."""
        return Passes(self.forward.times(n), self.inputs.times(n), self.weights.times(n))


def summed(found: Sequence[Passes]) -> Passes:
    """All of them, one after the other."""
    return Passes(
        sum((each.forward for each in found), StepTime()),
        sum((each.inputs for each in found), StepTime()),
        sum((each.weights for each in found), StepTime()),
    )
