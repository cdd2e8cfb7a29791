"""The rank that the others wait for is named while the run goes on.

Steps are equally long on all ranks, as each waits for the slowest. What differs is how long a rank is busy in a step:
its time less what it waited for others. Every `WINDOW` steps the busiest rank of each pipeline stage is compared with
the mean of the others of its stage, which do the same work; a rank alone in its stage with the other stages. Who is
the odd one in `WINDOWS` windows on end is told of: other programs on a host disturb each rank now and then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from stretto.collectives import all_reduce, all_reduce_max
from stretto.parallel_state import ParallelState
from stretto.train.readback import Readback

WINDOW, WINDOWS = 5, 3
"""Steps of one comparison, of which the median counts, and comparisons: a rank that becomes slow is told of within 18
steps. Its first window may have two slow steps, and what a window finds is read a step later."""

SLOWER, SLOWER_ALONE = 1.5, 3.0
"""How many times as busy as its equals a rank is that is told; as other stages, which do other work."""

SHARE, FLOOR = 0.1, 0.01
"""What a rank costs at least, of each step's time and in seconds: less is not worth a word."""

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
        self._first = True
        self._busy: list[float] = []
        self._whole: list[float] = []
        self._pending: list[Readback] = []
        self._found: dict[int, int] = {}
        """Slow ranks, and in how many windows on end."""

    @contextmanager
    def step(self) -> Iterator[None]:
        """Within, one step."""
        began, waited = time.perf_counter(), self.waited()
        yield
        whole = time.perf_counter() - began
        if self._first or self.world.size == 1:  # the first step makes what it uses
            self._first = False
            return
        self._whole.append(whole)
        self._busy.append(whole - (self.waited() - waited))
        if self._pending:
            self._tell(*(each.read() for each in self._pending))
            self._pending = []
        if len(self._whole) == WINDOW:
            self._pending = self._compare(median(self._busy), median(self._whole))
            self._busy, self._whole = [], []

    def _compare(self, busy: float, whole: float) -> list[Readback]:
        """Of each stage: the sum of its ranks' seconds, and their number; the busiest ranks, and the longest step."""
        stage, stages, rank = self.state.axis("pp").rank, self.state.axis("pp").size, self.state.world.rank
        device = self.state.world.device
        sums = torch.zeros(2, stages, dtype=torch.float64)
        sums[:, stage] = torch.tensor([busy, 1.0], dtype=torch.float64)
        most = torch.zeros(stages + 1, dtype=torch.int64)
        most[stage], most[stages] = packed(busy, rank), int(whole / MICROSECOND)
        return [_read(all_reduce(sums.to(device), self.world)), _read(all_reduce_max(most.to(device), self.world))]

    def _tell(self, sums: list[float], most: list[float]) -> None:
        """On rank 0, name ranks that stay slow, each once."""
        stages = len(sums) // 2
        slow = find(sums[:stages], sums[stages:], [int(x) for x in most[:stages]], most[stages] * MICROSECOND)
        self._found = {each.rank: self._found.get(each.rank, 0) + 1 for each in slow}
        for each in slow:
            if self.state.world.rank == 0 and self._found[each.rank] == WINDOWS:
                logging.getLogger("stretto").warning("%s", each)


def packed(seconds: float, rank: int) -> int:
    """A rank and how busy it is, as one number that orders by the latter."""
    return int(seconds / MICROSECOND) * _RANKS + rank


def find(busy: list[float], ranks: list[float], busiest: list[int], step: float) -> list[Slow]:
    """Slow ranks of one window, from what is known of each stage: seconds a step of all its ranks together, how many
    they are, the busiest as it is packed; and the seconds of a step."""
    found = []
    for stage, number in enumerate(busiest):
        worst, rank = number // _RANKS * MICROSECOND, number % _RANKS
        equals = ranks[stage] > 1
        total, count = (busy[stage], ranks[stage]) if equals else (sum(busy), sum(ranks))
        others = (total - worst) / (count - 1)
        excess, times = worst - others, SLOWER if equals else SLOWER_ALONE
        if worst > times * others and excess > SHARE * step and excess > FLOOR:
            found.append(Slow(rank, worst, others, step))
    return found


def _read(x: Tensor) -> Readback:
    return Readback(*x.flatten())
