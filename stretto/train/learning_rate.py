"""The learning rate as a function of how many updates have been made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from stretto.arguments.errors import as_flag
from stretto.arguments.schema import OptimizerConfig


@dataclass(frozen=True)
class LearningRate:
    """Called with the number of an update, counted from 1.

    The rate grows linearly up to `peak` at update `warmup`, then decays to `floor` at update `end` and stays there.
    `wsd` stays at the peak and decays linearly in its last `cooldown` updates (Hu et al., "MiniCPM", 2024). Raises
    ValueError where a shape lacks a number that it needs.
    """

    peak: float
    shape: Literal["cosine", "linear", "constant", "wsd"] = "constant"
    floor: float = 0.0
    warmup: int = 0
    end: int | None = None
    cooldown: int | None = None

    def __call__(self, update: int) -> float:
        """The rate of update number `update`."""
        warmup, peak, floor = self.warmup, self.peak, self.floor
        if warmup and update <= warmup:
            return peak * (update / warmup)  # the peak itself at the end, to the last bit
        if self.shape == "constant":
            return peak
        end = self._known(self.end, "end")
        if update > end:
            return floor
        start = warmup
        if self.shape == "wsd":
            start = end - self._known(self.cooldown, "cooldown")
            if update <= start:
                return peak
        done = (update - start) / (end - start)
        share = 0.5 * (math.cos(math.pi * done) + 1) if self.shape == "cosine" else 1 - done
        return floor + share * (peak - floor)

    def _known(self, value: int | None, name: str) -> int:
        if value is None:
            raise ValueError(f"a learning rate of shape {self.shape} needs {name}: the number of updates")
        return value


SCHEDULE = ("lr", "min_lr", "lr_schedule", "warmup_steps", "decay_steps", "cooldown_steps")
"""The settings of which `learning_rate` is made."""


def changed_rate(old: OptimizerConfig, new: OptimizerConfig, update: int) -> str | None:
    """What has changed in the schedule of a run that goes on with `update`, and how to keep it; None where nothing."""
    differ = {name: (getattr(old, name), getattr(new, name)) for name in SCHEDULE}
    differ = {name: values for name, values in differ.items() if values[0] != values[1]}
    if not differ:
        return None
    rates = [learning_rate(config)(update) for config in (old, new)]
    digits = next((n for n in range(3, 17) if f"{rates[0]:.{n}g}" != f"{rates[1]:.{n}g}"), 3)  # that tell them apart
    before, now = (f"{rate:.{digits}g}" for rate in rates)
    was = "as it was to be" if before == now else f"was to be {before}"
    said = ", ".join(f"{name} {then} is now {value}" for name, (then, value) in differ.items())
    keep = " ".join(as_flag(name, then) for name, (then, _) in differ.items())
    return f"{now} at step {update}, {was}: {said}; to keep the former schedule, add {keep}"


def learning_rate(config: OptimizerConfig) -> LearningRate:
    """What resolved settings say of the rate."""
    return LearningRate(
        config.lr,
        config.lr_schedule,
        config.min_lr,
        config.warmup_steps,
        config.decay_steps,
        config.cooldown_steps,
    )
