"""The learning rate as a function of how many updates have been made."""

from __future__ import annotations

import math

from stretto.arguments.errors import as_flag
from stretto.arguments.schema import OptimizerConfig


def learning_rate(update: int, config: OptimizerConfig) -> float:
    """The rate of update number `update`, counted from 1; `config` is resolved (its `decay_steps` is known).

    It grows linearly up to `lr` at update `warmup_steps`, then decays to `min_lr` at update `decay_steps` and stays
    there. `wsd` stays at the peak and decays linearly in its last `cooldown_steps` (Hu et al., "MiniCPM", 2024).
    """
    warmup, peak, floor = config.warmup_steps, config.lr, config.min_lr
    if warmup and update <= warmup:
        return peak * (update / warmup)  # the peak itself at the end, to the last bit
    if config.lr_schedule == "constant":
        return peak
    end = _known(config.decay_steps, "decay_steps")
    if update > end:
        return floor
    start = warmup
    if config.lr_schedule == "wsd":
        start = end - _known(config.cooldown_steps, "cooldown_steps")
        if update <= start:
            return peak
    done = (update - start) / (end - start)
    share = 0.5 * (math.cos(math.pi * done) + 1) if config.lr_schedule == "cosine" else 1 - done
    return floor + share * (peak - floor)


SCHEDULE = ("lr", "min_lr", "lr_schedule", "warmup_steps", "decay_steps", "cooldown_steps")
"""The settings of which `learning_rate` is a function."""


def changed_rate(old: OptimizerConfig, new: OptimizerConfig, update: int) -> str | None:
    """What has changed in the schedule of a run that goes on with `update`, and how to keep it; None where nothing."""
    differ = {name: (getattr(old, name), getattr(new, name)) for name in SCHEDULE}
    differ = {name: values for name, values in differ.items() if values[0] != values[1]}
    if not differ:
        return None
    before, now = (f"{learning_rate(update, config):.3g}" for config in (old, new))
    said = ", ".join(f"{name} {then} is now {value}" for name, (then, value) in differ.items())
    keep = " ".join(as_flag(name, then) for name, (then, _) in differ.items())
    return f"{now} at step {update}, was to be {before}: {said}; to keep the former schedule, add {keep}"


def _known(value: int | None, name: str) -> int:
    if value is None:
        raise ValueError(f"optimizer.{name} is not resolved")
    return value
