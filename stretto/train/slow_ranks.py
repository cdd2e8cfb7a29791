"""The rank that the others wait for is named while the run goes on.

Steps are equally long on all ranks, as each waits for the slowest. What differs is how long a rank is busy in a step:
its time less what it waited for others. Every `WINDOW` steps the busiest rank of each pipeline stage is compared with
the mean of the others of its stage, which do the same work; a rank alone in its stage with the other stages.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from stretto.collectives import all_reduce, all_reduce_max
from stretto.parallel_state import ParallelState
from stretto.train.readback import Readback

WINDOW = 8
"""Steps of one comparison: a rank that becomes slow at any step is told within two of them and a step."""

SLOWER, SLOWER_ALONE = 1.5, 3.0
"""How many times as busy as its equals a rank is that is told; as other stages, which do other work."""

SHARE = 0.1
"""Of the steps' time that a rank costs at least: less is not worth a word."""

MICROSECOND = 1e-6
_RANKS = 2**17
"""The busiest rank is the largest number of microseconds * _RANKS + rank, exact in fp64 for 19 hours."""


@dataclass(frozen=True)
class Slow:
    """A rank that the others wait for, seconds a step."""

    rank: int
    busy: float
    others: float
    step: float

    def __str__(self) -> str:
        return (
            f"rank {self.rank} is slow: it is busy for {self.busy:.3g} s of each step, "
            f"others for {self.others:.3g} s, and a step takes {self.step:.3g} s"
        )


class SlowRanks:
    """Of one rank's steps; `waited` says how many seconds it has waited for others so far."""

    def __init__(self, state: ParallelState, waited: Callable[[], float]) -> None:
        self.state, self.waited = state, waited
        self.world = state.axis("tp", "cp", "dp", "pp")
        self._steps, self._busy, self._whole = -1, 0.0, 0.0  # the first step makes what it uses: it does not count
        self._pending: list[Readback] = []
        self._said: tuple[int, ...] = ()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Within, one step."""
        began, waited = time.perf_counter(), self.waited()
        yield
        whole = time.perf_counter() - began
        self._steps += 1
        if self._steps > 0:
            self._whole += whole
            self._busy += whole - (self.waited() - waited)
        if self._pending:
            self._tell(*(each.read() for each in self._pending))
            self._pending = []
        if self._steps == WINDOW and self.world.size > 1:
            self._pending = self._compare()
        if self._steps == WINDOW:
            self._steps, self._busy, self._whole = 0, 0.0, 0.0

    def _compare(self) -> list[Readback]:
        """Of each stage: the sum of its ranks' seconds, their number, the longest steps, and the busiest rank."""
        stage, stages, rank = self.state.axis("pp").rank, self.state.axis("pp").size, self.state.world.rank
        device = self.state.world.device
        sums = torch.zeros(2, stages, dtype=torch.float64, device=device)
        sums[:, stage] = torch.tensor([self._busy, 1.0], dtype=torch.float64)
        busiest = torch.zeros(stages + 1, dtype=torch.int64, device=device)
        busiest[stage] = int(self._busy / MICROSECOND) * _RANKS + rank
        busiest[stages] = int(self._whole / MICROSECOND)
        return [_read(all_reduce(sums, self.world)), _read(all_reduce_max(busiest, self.world))]

    def _tell(self, sums: list[float], busiest: list[float]) -> None:
        """On rank 0, name ranks that are slow, each once as long as it stays so."""
        stages = len(sums) // 2
        slow = find(sums[:stages], sums[stages:], [int(x) for x in busiest[:stages]], busiest[stages] * MICROSECOND)
        named = tuple(each.rank for each in slow)
        if self.state.world.rank == 0 and named != self._said:
            for each in slow:
                logging.getLogger("stretto").warning("%s", each)
        self._said = named


def find(busy: list[float], ranks: list[float], busiest: list[int], whole: float) -> list[Slow]:
    """Slow ranks, from what `SlowRanks` gathers of each stage over a window: seconds of all its ranks, how many
    they are, the busiest as it is packed; and the seconds of the window."""
    found = []
    for stage, packed in enumerate(busiest):
        worst, rank = packed // _RANKS * MICROSECOND, packed % _RANKS
        equals = ranks[stage] > 1
        total, count = (busy[stage], ranks[stage]) if equals else (sum(busy), sum(ranks))
        others = (total - worst) / (count - 1)
        if worst > (SLOWER if equals else SLOWER_ALONE) * others and worst - others > SHARE * whole:
            found.append(Slow(rank, worst / WINDOW, others / WINDOW, whole / WINDOW))
    return found


def _read(x: Tensor) -> Readback:
    return Readback(*x.flatten())
