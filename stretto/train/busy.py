"""How long this rank's own forwards and backwards take, without its waits for other stages and replicas.

All ranks of a run finish a step together, so the time of a step tells nothing about who was slow; the time of the
computations alone does. Those of a tensor-parallel group hold its collectives, so its ranks share a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from stretto.pipeline_parallel import Stage
from stretto.pipeline_parallel.meta import Passed


class BusyTime:
    """Milliseconds of what ran in `measured`, taken when the device has passed it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._ms = 0.0

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Add the time of the body."""
        if self._cuda and torch.cuda.is_current_stream_capturing():
            yield  # nothing runs: its replays are measured
        elif self._cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            began = time.perf_counter()
            yield
            self._ms += (time.perf_counter() - began) * 1e3

    def take(self) -> float:
        """All that is over, and was not taken before. The host waits for nothing."""
        while self._events and self._events[0][1].query():  # type: ignore[no-untyped-call]
            begin, end = self._events.pop(0)
            self._ms += begin.elapsed_time(end)
        taken, self._ms = self._ms, 0.0
        return taken


class TimedStage(Stage):
    """A stage whose computations are timed."""

    def __init__(self, busy: BusyTime, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._busy = busy

    def forward(self, mb: int, x: Passed | None, microbatch: Any) -> Passed:
        with self._busy.measured():
            return super().forward(mb, x, microbatch)

    def backward(self, mb: int, dy: Passed | None) -> Passed | None:
        with self._busy.measured():
            return super().backward(mb, dy)

    def replay(self, microbatch: Callable[[], object]) -> None:
        with self._busy.measured():
            super().replay(microbatch)

    def backward_weight(self, mb: int) -> None:
        with self._busy.measured():
            super().backward_weight(mb)
