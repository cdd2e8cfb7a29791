"""When the computations of this rank begin and end, without their waits for other ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from stretto.pipeline_parallel.link import Link
from stretto.pipeline_parallel.meta import TensorMeta
from stretto.schedule import Action, Span


class Clock:
    """Spans of computations while it runs, in seconds of the wall clock, which hosts share about as well as NTP."""

    def __init__(self, device: torch.device, rank: int) -> None:
        self.running, self._rank, self._cuda = False, rank, device.type == "cuda"
        self._steps: list[list[tuple[Action, Any, Any]]] = []
        self._origin: tuple[float, Any] = 0.0, None

    def start(self) -> None:
        """Record from here on. The host waits for the device."""
        self.running, self._steps = True, []
        at = self._event() if self._cuda else None
        if at is not None:
            at.synchronize()
        self._origin = time.time() - (0.0 if self._cuda else time.perf_counter()), at

    def stop(self) -> list[list[Span]]:
        """What was recorded, step by step. The host waits for the device."""
        if self._cuda and self.running:
            torch.cuda.synchronize()
        steps, self._steps, self.running = self._steps, [], False
        return [[Span(self._rank, a, self._seconds(b), self._seconds(e)) for a, b, e in step] for step in steps]

    def step(self) -> None:
        """A step begins."""
        if self.running:
            self._steps.append([])

    @contextmanager
    def measured(self, action: Action) -> Iterator[None]:
        """The body is the computation of this action."""
        if not self.running:
            yield
            return
        begin = self._now()
        yield
        self._steps[-1].append((action, begin, self._now()))

    def _now(self) -> Any:
        return self._event() if self._cuda else time.perf_counter()

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _seconds(self, at: Any) -> float:
        origin, event = self._origin
        return float(origin + (at if event is None else event.elapsed_time(at) * 1e-3))


def hop_seconds(link: Link, size: int, times: int = 7) -> float:
    """How long a message of `size` bytes takes to a rank that waits for it: the slowest median of this rank's pairs.

    All ranks of the axis call it together; pairs of neighbours that share no rank measure side by side. 0 where there
    is one rank.
    """
    rank, size = link.axis.rank, link.axis.size
    meta = TensorMeta((max(1, size // 4),), torch.float32)
    x = torch.zeros(meta.shape, device=link.device)
    slowest = 0.0
    for parity in (0, 1):
        low = rank if rank % 2 == parity else rank - 1
        if low < 0 or low + 1 >= size:
            continue
        taken = []
        for _ in range(times):
            _wait(link.device)
            began = time.perf_counter()
            if rank == low:
                link.send(x, low + 1)
                link.recv(meta, low + 1).wait()
            else:
                link.recv(meta, low).wait()
                link.send(x, low)
            _wait(link.device)
            taken.append((time.perf_counter() - began) / 2)
        link.drain()
        slowest = max(slowest, median(taken))
    return slowest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
