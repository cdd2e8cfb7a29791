"""Saves beside steps of training on one device: what a save costs the steps, how long it takes, and what it saved.

A step is a stream of bf16 matmuls of known length and then an update that changes every tensor of the state; the host
is one step ahead, as in training. The first and the last tensor of each checkpoint are compared with their values when
the save began: an update that overtakes a copy shows.
"""

from __future__ import annotations

import platform
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from benchmarks.train.measure import sustained, synchronize
from stretto.checkpoint import Saver
from stretto.checkpoint.directory import step_path
from stretto.params import Slice
from stretto.world import World

MOST_STEPS = 2000
AT_LEAST = 4
FIGURES = ("stall_s", "copied_s", "total_s", "step_ms", "slowest_step_ms", "steps_per_s", "lost_s")


class Way(Protocol):
    """One way to save asynchronously."""

    copied: float
    """When the state was in host memory, by `time.perf_counter`; 0: not known."""

    def begin(self, n: int) -> None:
        """Begin the n-th save; training goes on when it returns."""

    def before_update(self) -> None:
        """The state is about to change."""

    def over(self) -> bool:
        """Whether the checkpoint is whole, or never will be; called once a step."""

    def finish(self) -> None:
        """Wait for it. Raises when it has failed."""

    def path(self, n: int) -> Path:
        """The n-th checkpoint."""

    def close(self) -> None:
        """Give back what it holds."""


class Ours:
    """`stretto.checkpoint.Saver`."""

    copied = 0.0

    def __init__(self, held: dict[str, Tensor], where: Path, device: torch.device) -> None:
        self.where, self.whole = where, False
        self.slices = [Slice(name, x, tuple(x.shape), (0,) * x.dim(), True) for name, x in held.items()]
        self.saver = Saver(World.single(device))
        self.saver.reserve(self.slices)

    def begin(self, n: int) -> None:
        self.whole, self.began = False, time.perf_counter()
        self.saver.begin(self.where, n, self.slices, {})

    def before_update(self) -> None:
        self.saver.before_update()

    def over(self) -> bool:
        self._told(self.saver.poll())
        return self.whole or self.saver.failed

    def finish(self) -> None:
        self._told(self.saver.finish())

    def _told(self, saved: Any) -> None:
        for one in saved:
            self.whole, self.copied = True, self.began + one.copied

    def path(self, n: int) -> Path:
        return step_path(self.where, n)

    def close(self) -> None:
        self.saver.close()


class KeptStager(DefaultStager):
    """Torch's, which can be used again: that of 2.11 closes itself after the first use (pytorch#183413)."""

    def __init__(self, config: StagingOptions) -> None:
        super().__init__(config)
        self._state_dict_stager.close = lambda: None  # type: ignore[method-assign]

    def close(self) -> None:
        """Give back its memory."""
        del self._state_dict_stager.close
        super().close()


class Torchs:
    """`torch.distributed.checkpoint.async_save` with a stager that keeps its memory, pinned on a GPU.

    Its copy does not wait for what the device has still to do: whoever begins a save waits for the device. Its writer
    copies nothing ahead, since all is in host memory: as torch sets it up, it waits for the stream of training after
    every 10 MB, and 8 GiB beside steps of 0.28 s were not written after 140 s.
    """

    copied = 0.0

    def __init__(self, held: dict[str, Tensor], where: Path, device: torch.device, kind: AsyncCheckpointerType) -> None:
        self.held, self.where, self.kind = held, where, kind
        gpu, process = device.type == "cuda", kind is AsyncCheckpointerType.PROCESS
        self.stager = KeptStager(StagingOptions(gpu, process, gpu, gpu))
        staged: Any = self.stager.stage(held)  # it takes its memory
        if gpu:
            staged.result()

    def begin(self, n: int) -> None:
        writer = dcp.FileSystemWriter(self.path(n), per_thread_copy_ahead=0)
        response: Any = dcp.async_save(
            self.held, storage_writer=writer, async_checkpointer_type=self.kind, async_stager=self.stager
        )
        self.copied = time.perf_counter()
        self.written = getattr(response, "upload_completion", response)
        self.staged = getattr(response, "staging_completion", None)
        if self.staged is not None:
            self.staged.add_done_callback(self._staged)

    def _staged(self, _: object) -> None:
        self.copied = time.perf_counter()

    def before_update(self) -> None:
        if self.staged is not None:
            self.staged.result()

    def over(self) -> bool:
        return bool(self.written.done())

    def finish(self) -> None:
        self.written.result()

    def path(self, n: int) -> Path:
        return self.where / f"{n}"

    def close(self) -> None:
        self.stager.close()


WAYS: dict[str, Callable[[dict[str, Tensor], Path, torch.device], Way]] = {
    "stretto": Ours,
    "torch-thread": lambda held, where, device: Torchs(held, where, device, AsyncCheckpointerType.THREAD),
    "torch-process": lambda held, where, device: Torchs(held, where, device, AsyncCheckpointerType.PROCESS),
}


@dataclass
class Training:
    """Steps of about `step_ms`, each of which ends with an update of what is saved."""

    held: dict[str, Tensor]
    device: torch.device
    step_ms: float

    def __post_init__(self) -> None:
        n = 8192 if self.device.type == "cuda" else 256
        self.a, self.b, self.c = (torch.randn(n, n, device=self.device, dtype=torch.bfloat16) for _ in range(3))
        self.tensors = list(self.held.values())
        each = sustained(self._matmul, self.device, seconds=min(1.0, 2e-3 * self.step_ms))
        self.matmuls = max(1, round(self.step_ms / each))

    def _matmul(self) -> None:
        torch.mm(self.a, self.b, out=self.c)

    def run(self, over: Callable[[], bool], before_update: Callable[[], object], *, least: int) -> list[float]:
        """Milliseconds of each step, until it is over and `least` were made."""
        marks = [self._mark()]
        while len(marks) <= least or (not over() and len(marks) < MOST_STEPS):
            for _ in range(self.matmuls):
                self._matmul()
            before_update()
            torch._foreach_add_(self.tensors, 1.0)
            marks.append(self._mark())
            if not isinstance(ahead := marks[-2], float):
                ahead.synchronize()
        synchronize(self.device)
        return [self._ms(a, b) for a, b in pairwise(marks)]

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _ms(self, a: Any, b: Any) -> float:
        return 1e3 * (b - a) if isinstance(a, float) else float(a.elapsed_time(b))


def measure(
    held: dict[str, Tensor], where: Path, *, ways: list[str], repeat: int, step_ms: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Each way in turns, `repeat` saves of each; the medians."""
    device = next(iter(held.values())).device
    training = Training(held, device, step_ms)
    alone = statistics.median(training.run(lambda: True, lambda: None, least=12)[2:])
    size = sum(x.nbytes for x in held.values())
    say(f"{size / 2**30:.1f} GiB; {alone:.1f} ms a step of {training.matmuls} matmuls and an update, undisturbed")
    found: dict[str, Any] = {"bytes": size, "undisturbed_step_ms": alone, "ways": {}}
    made: dict[str, Way] = {}
    rows: dict[str, list[dict[str, float]]] = {}
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())  # async_save wants one
    for n in range(1, repeat + 1):
        for name in ways:
            if "failed" in found["ways"].get(name, {}):
                continue
            try:
                if name not in made:
                    began = time.perf_counter()
                    made[name] = WAYS[name](held, where / name, device)
                    say(f"{name}: ready to save in {time.perf_counter() - began:.1f} s")
                rows.setdefault(name, []).append(_one(made[name], n, training, alone))
                kept = rows[name]
                figures: dict[str, Any] = {key: statistics.median(row[key] for row in kept) for key in FIGURES}
                found["ways"][name] = figures | {"equal": all(row["equal"] for row in kept), "saves": len(kept)}
                say(f"{name}: " + ", ".join(f"{key} {kept[-1][key]:.3f}" for key in FIGURES))
            except Exception as error:  # noqa: BLE001  # of any kind: the others go on
                found["ways"][name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]:.200}"}
                say(f"{name}: {found['ways'][name]['failed']}")
            shutil.rmtree(where / name, ignore_errors=True)
    for way in made.values():
        way.close()
    dist.destroy_process_group()
    return found


def _one(way: Way, n: int, training: Training, alone: float) -> dict[str, float]:
    held, device = training.held, training.device
    before = {name: held[name].clone().cpu() for name in (next(iter(held)), next(reversed(held)))}
    synchronize(device)
    began = time.perf_counter()
    way.begin(n)
    stall = time.perf_counter() - began
    steps = training.run(way.over, way.before_update, least=AT_LEAST)
    wall = time.perf_counter() - began
    way.finish()
    total = time.perf_counter() - began
    saved = {name: torch.empty_like(x) for name, x in before.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(saved, checkpoint_id=way.path(n), no_dist=True)
    return {
        "stall_s": stall,
        "copied_s": max(0.0, way.copied - began),
        "total_s": total,
        "step_ms": statistics.median(steps),
        "slowest_step_ms": max(steps),
        "steps_per_s": 1e3 * len(steps) / sum(steps),
        "lost_s": wall - 1e-3 * alone * len(steps),
        "equal": all(torch.equal(saved[name], x) for name, x in before.items()),
    }


def beside_steps(
    held: dict[str, Tensor], folder: AbstractContextManager[Path], ways: str, repeat: int, step_ms: float
) -> dict[str, Any]:
    """Measure and print; also on which device and versions."""
    began, device = time.monotonic(), next(iter(held.values())).device

    def say(line: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {line}", flush=True)

    with folder as where:
        found = measure(held, where, ways=ways.split(","), repeat=repeat, step_ms=step_ms, say=say)
    show(found, Console(width=140))
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU {platform.machine()}"
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()} | found


def show(found: dict[str, Any], console: Console) -> None:
    """One line for each way."""
    title = f"saves of {found['bytes'] / 2**30:.1f} GiB; a step alone takes {found['undisturbed_step_ms']:.1f} ms"
    columns = ("stall s", "in host memory s", "whole s", "step ms", "slowest", "steps/s", "training lost s", "right")
    table = Table("", *columns, title=title)
    for name, row in found["ways"].items():
        if "failed" in row:
            table.add_row(name, row["failed"])
            continue
        table.add_row(name, *(f"{row[key]:.3f}" for key in FIGURES), "yes" if row["equal"] else "NO")
    console.print(table)
