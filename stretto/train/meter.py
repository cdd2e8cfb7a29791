"""What a run measures of itself: speed, waits and memory, as means since the last line that was told."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from stretto.collectives import all_reduce_max
from stretto.estimate import Flops
from stretto.train.busy import BusyTime
from stretto.world import Axis

_RANKS = 2**20
"""More than there are: a time in microseconds, times this, plus the rank, is exact in fp64 for two hours."""


@dataclass(frozen=True)
class Work:
    """What a step computes: tokens over all ranks, and operations for each, where they are known."""

    tokens: int
    flops: Flops | None = None
    peak_tflops: float | None = None
    """Of one device, in its dense arithmetic for the dtype of the run."""
    waste: float | None = None
    """Share of the tokens that are none, where rows are packed."""


class Meter:
    """The clocks of this rank. `world` is the axis of all ranks; times of training exclude what is done `aside`."""

    def __init__(
        self,
        work: Work,
        world: Axis,
        device: torch.device,
        busy: BusyTime,
        *,
        apart: Callable[[], int] = int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`apart` tells bytes of device memory that torch's allocator does not count."""
        self._apart = apart
        self._work, self._world, self._device, self._busy, self._clock = work, world, device, busy, clock
        self._since = clock()
        self._seconds = self._data = 0.0
        self._steps = 0
        self._window: Counter[str] = Counter()
        self._last: dict[str, float] = {}
        self._peers: tuple[float, ...] | None = None
        self.totals: Counter[str] = Counter()
        """Seconds of each kind in the whole run."""

    @contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Add the time of the body to the seconds of a kind."""
        began = self._clock()
        yield
        seconds = self._clock() - began
        self._last[kind] = seconds
        self._window[kind] += seconds  # type: ignore[assignment]  # a Counter of seconds
        self.totals[kind] += seconds  # type: ignore[assignment]

    def last(self, kind: str) -> float:
        """Seconds of a kind, the last time."""
        return self._last[kind]

    def now(self) -> float:
        """The time, for `stepped`."""
        return self._clock()

    def stepped(self, launched: float, *, ago: float | None = None, data: float = 0.0) -> None:
        """A step, which waited for its `data` so many seconds, has ended: so many seconds `ago`, where the host knows
        it, as it has waited for it; else when it was launched, since the device was never behind. Launched before the
        one before it had ended, it ended some time since: halfway to now, so that neither it nor the next one took no
        time, or less."""
        ended = launched if ago is None else self._clock() - ago
        done_at = ended if ended > self._since else (self._since + self._clock()) / 2
        self._seconds += done_at - self._since
        self._since, self._steps, self._data = done_at, self._steps + 1, self._data + data

    def resume(self) -> None:
        """What was not training does not count as it: the next step begins now."""
        self._since = self._clock()

    def exchange(self) -> tuple[Tensor, ...]:
        """The slowest rank, the fastest, and the most memory, over all ranks: scalars on the device, for `heard`.

        All ranks call it together. Times are those of steps that the device has done.
        """
        if self._world.size == 1:
            return ()
        busy = round(self._busy.take() * 1e3) * _RANKS
        rank = self._world.rank
        own = torch.tensor([busy + rank, -busy - rank, *self._memory()], dtype=torch.float64)
        if self._device.type == "cuda":
            own = own.pin_memory().to(self._device, non_blocking=True)
        return all_reduce_max(own, self._world).unbind()

    def heard(self, values: list[float]) -> None:
        """What `exchange` gave, on the host."""
        if values:
            self._peers = tuple(values)

    def figures(self) -> dict[str, float | int]:
        """Fields of a `StepRecord`: means over the steps since the last line."""
        mean = self._seconds / self._steps
        speed = self._work.tokens / mean
        each = speed / self._world.size
        found: dict[str, float | int] = {
            "tokens_per_second": speed,
            "tokens_per_second_per_gpu": each,
            "ms_per_step": mean * 1e3,
            "data_wait_ms": self._data / self._steps * 1e3,
        }
        found |= {} if self._work.waste is None else {"packing_waste": self._work.waste}
        found |= {f"{kind}_seconds": self._window[kind] for kind in ("checkpoint", "evaluation") if self._window[kind]}
        if (flops := self._work.flops) is not None:
            for name, operations in (("full", flops.full), ("causal", flops.causal)):
                found[f"tflops_per_gpu_{name}"] = rate = operations * each * 1e-12
                if self._work.peak_tflops:
                    found[f"mfu_{name}"] = rate / self._work.peak_tflops
        memory = self._memory() if self._peers is None else self._peers[2:]
        found |= {name: size / 2**30 for name, size in zip(("peak_gib", "reserved_gib"), memory, strict=True) if size}
        if self._peers is not None and self._peers[0] >= _RANKS:
            (slowest, slow), (fastest, fast) = (divmod(int(abs(value)), _RANKS)[::-1] for value in self._peers[:2])
            found |= {"slowest_rank": slowest, "fastest_rank": fastest, "slowest_over_fastest": slow / max(fast, 1)}
        return found

    def new_line(self) -> None:
        """A line was told: means begin anew."""
        self._seconds, self._steps, self._data = 0.0, 0, 0.0
        self._window.clear()

    def _memory(self) -> tuple[float, float]:
        """Bytes: the most that was in use, and the most that was reserved (0 where that is no other number)."""
        if self._device.type == "cuda":
            peak, reserved = torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved
            apart = self._apart()
            return float(peak(self._device) + apart), float(reserved(self._device) + apart)
        unit = 1 if sys.platform == "darwin" else 1024
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit), 0.0
