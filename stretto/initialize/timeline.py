"""How long each phase of the start took, and on which rank longest.

timeline = Timeline(began=process_began())
timeline.until_now("imports")
with initialize(timeline=timeline) as world:
    with timeline.phase("model"): ...
    slowest = timeline.gather(world)        # on rank 0; None on the others
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

from stretto.world import World


@dataclass(frozen=True)
class Phase:
    """One phase over all ranks: the slowest is who the others wait for."""

    name: str
    seconds: float
    """Of the slowest rank."""
    rank: int
    """The slowest rank."""
    median: float
    """Of all ranks, in seconds."""

    def __str__(self) -> str:
        late = f" on rank {self.rank}, median {self.median:.1f} s" if self.seconds - self.median >= 0.1 else ""
        return f"{self.name} {self.seconds:.1f} s{late}"


class Timeline:
    """The phases of this rank, in the order in which they first began; a phase may be entered again.

    `began`: when the start began, by `clock`; by default now. What a process knows its forked children know, too.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, began: float | None = None) -> None:
        self._clock = clock
        self._began = self._end = clock() if began is None else began
        self.seconds: dict[str, float] = {}

    @property
    def total(self) -> float:
        """Seconds from the beginning of the start to the end of the last phase, what lies between phases included."""
        return self._end - self._began

    def __str__(self) -> str:
        return ", ".join(f"{name} {taken:.1f} s" for name, taken in self.seconds.items())

    def until_now(self, name: str) -> None:
        """Make a phase of all that was, from the beginning of the start on."""
        self._end = self._clock()
        self.seconds[name] = self.total

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the body to a phase. Where a device works asynchronously, synchronize in the body."""
        began = self._clock()
        self.seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            self._end = self._clock()
            self.seconds[name] += self._end - began

    def gather(self, world: World, *, key: str = "timeline") -> list[Phase] | None:
        """The phases over all ranks, on rank 0; None on the others, which do not wait.

        One small value per rank goes through the world's store. `key` is used once in the life of a world.
        """
        if world.store is None:
            return slowest([self.seconds])
        world.store.set(f"{key}/{world.rank}", json.dumps(self.seconds))
        if world.rank != 0:
            return None
        return slowest([json.loads(world.store.get(f"{key}/{rank}")) for rank in range(world.size)])


def slowest(ranks: list[dict[str, float]]) -> list[Phase]:
    """Each phase that any rank has, with the rank that took longest."""
    names = dict.fromkeys(name for seconds in ranks for name in seconds)
    phases = []
    for name in names:
        taken = [seconds.get(name, 0.0) for seconds in ranks]
        worst = max(range(len(taken)), key=taken.__getitem__)
        phases.append(Phase(name, taken[worst], worst, median(taken)))
    return phases


def line(phases: list[Phase], total: float) -> str:
    """The start-up on one line: "start-up 7.9 s: imports 1.8 s, model 5.1 s on rank 3, median 2.0 s, ..."."""
    return f"start-up {total:.1f} s: " + ", ".join(map(str, phases))
