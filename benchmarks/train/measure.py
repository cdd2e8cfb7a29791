"""Time of steps on a device, and what is told of a list of times."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True)
class Spread:
    """Milliseconds: the median of `count` values, and what a tenth of them stays under and over."""

    median: float
    p10: float
    p90: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises ValueError for no values."""
        if not values:
            raise ValueError("a spread of no values")
        ordered = sorted(values)
        return cls(_quantile(ordered, 0.5), _quantile(ordered, 0.1), _quantile(ordered, 0.9), len(ordered))


def _quantile(ordered: Sequence[float], q: float) -> float:
    """With linear interpolation between the two neighbours."""
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def synchronize(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_times(step: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Milliseconds of each of `count` steps, one right after the other.

    On a GPU, between events on the current stream, so that the host may run ahead as it does in training.
    """
    synchronize(device)
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(count):
            step()
            marks.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    synchronize(device)
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def sustained(run: Callable[[], object], device: torch.device, *, seconds: float) -> float:
    """Milliseconds of one call, over at least `seconds` without a pause, after half as long to get warm.

    Long enough for the clocks to settle where the power limit holds them, as in training.
    """
    run()
    first = max(step_times(run, 1, device)[0], 1e-3)
    calls = max(3, int(1e3 * seconds / first))
    for _ in range(calls // 2):
        run()
    return sum(step_times(lambda: _repeat(run, calls), 1, device)) / calls


def _repeat(run: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        run()
