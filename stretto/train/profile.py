"""A window of steps under torch's profiler: `--profile steps=10:13`.

Each chosen rank writes `rank-N.trace.json.gz`, for https://ui.perfetto.dev or chrome://tracing, and on a GPU
`rank-N.memory.pickle`, a history of allocations for https://docs.pytorch.org/memory_viz.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from stretto.notation.profile import ProfileWindow

EVENTS = 200_000
"""Allocations that a memory history holds: the newest."""


@dataclass
class Profile:
    """`begin(step)` is told of each step before it is launched; `close` ends what is under way."""

    window: ProfileWindow
    directory: Path
    rank: int
    device: torch.device
    _profiler: Any = field(default=None, init=False, repr=False)

    def begin(self, step: int) -> None:
        """Start with the first step of the window, and write after the last."""
        if self.rank not in self.window.ranks:
            return
        if self._profiler is None and step in self.window.steps:
            self._start()
        elif self._profiler is not None and step not in self.window.steps:
            self.close()

    def close(self) -> None:
        """Write what was recorded, if anything was."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        self._synchronize()
        profiler.stop()
        self.directory.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.directory / f"rank-{self.rank}.trace.json.gz"))
        if self.device.type == "cuda":
            history = str(self.directory / f"rank-{self.rank}.memory.pickle")
            torch.cuda.memory._dump_snapshot(history)  # type: ignore[no-untyped-call]
            torch.cuda.memory._record_memory_history(enabled=None)

    def _start(self) -> None:
        self._synchronize()  # what was launched before is no part of it
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=EVENTS)
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # as it starts and stops, it writes so to standard error
        memory = self.device.type == "cuda"  # of a CPU's, torch warns of all that was there before
        self._profiler = profile(activities=activities, record_shapes=True, profile_memory=memory, acc_events=True)
        self._profiler.start()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
