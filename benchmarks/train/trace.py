"""The kernels of one step, from torch's profiler."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.train.measure import synchronize
from benchmarks.train.waterfall import Kernel

_MARK = "benchmarked step "
_STEPS = 8
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def trace_step(
    step: Callable[[], object], device: torch.device, keep: Path | None = None
) -> tuple[list[Kernel], tuple[float, float]]:
    """(the kernels that one of several steps in a row launched, its window); milliseconds.

    A device that has rested is quicker for a second, so steps go before it, under the profiler like the rest. The host
    is not made to wait between the steps, so that it runs ahead as in training. `keep` gets the whole trace.
    Raises RuntimeError when the trace has no kernels.
    """
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for n in range(_STEPS):
            with record_function(f"{_MARK}{n}"):
                step()
        synchronize(device)
    with tempfile.TemporaryDirectory() as directory:
        path = keep or Path(directory) / "trace.json"
        found.export_chrome_trace(str(path))
        return step_of(json.loads(path.read_text())["traceEvents"], _STEPS - 2)


def step_of(events: list[dict[str, Any]], n: int) -> tuple[list[Kernel], tuple[float, float]]:
    """Kernels and window of step `n` > 0 of a trace in Chrome's format (microseconds there).

    A kernel belongs to the step during which the host launched it; a window begins where the one before ends.
    """
    launches = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    marks = {
        event["name"]: (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith(_MARK)
    }

    def kernels(step: int) -> list[Kernel]:
        begin, end = marks[f"{_MARK}{step}"]
        return [
            Kernel(event["name"], event["ts"] * 1e-3, (event["ts"] + event["dur"]) * 1e-3)
            for event in events
            if event.get("cat") in _ON_DEVICE
            and begin <= launches.get(event.get("args", {}).get("correlation"), -1.0) <= end
        ]

    before, here = kernels(n - 1), kernels(n)
    if not before or not here:
        raise RuntimeError("the trace has no kernels: is there a GPU, and may this process profile it?")
    return here, (max(k.end for k in before), max(k.end for k in here))
