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

from stretto.store import TimedStore, combine, read_json
from stretto.world import World

SAMPLES = 64
"""Seconds of a phase that are kept of any number of ranks: the median of no more is exact."""

GATHER_SECONDS = 600.0
"""How long rank 0 waits for the others' phases."""


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


class StartTimeline:
    """The phases of this rank, in the order in which they first began; a phase may be entered again.

    `began`: when the start began, by `clock`; by default now. What a process knows its forked children know, too.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, began: float | None = None) -> None:
        self._clock = clock
        self._began = self._end = clock() if began is None else began
        self.seconds: dict[str, float] = {}
        self.current = ""
        """What this rank is doing, in words, should it fail."""

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
        began, self.current = self._clock(), f"in the phase {name!r}"
        self.seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            self._end, self.current = self._clock(), f"after the phase {name!r}"
            self.seconds[name] += self._end - began

    def gather(self, world: World, *, key: str = "timeline") -> list[Phase] | None:
        """The phases over all ranks, on rank 0; None on the others, which do not wait.

        The values are joined in the world's store by whoever comes last: a few small messages per rank. `key` is
        used once in the life of a world.
        """
        own = of_rank(world.rank, self.seconds)
        if world.store is None:
            return phases_of(own)
        store = TimedStore.over(world.store).under(key)
        if (whole := combine(store, world.rank, world.size, json.dumps(own), _merged)) is not None:
            store.set("whole", whole)
        if world.rank != 0 or not store.wait("whole", GATHER_SECONDS):
            return None
        return phases_of(read_json(store.get("whole")))


Summary = dict[str, tuple[float, int, list[float]]]
"""By phase: the most seconds, on which rank, and samples of all ranks' seconds."""


def of_rank(rank: int, seconds: dict[str, float]) -> Summary:
    """The phases of one rank."""
    return {name: (taken, rank, [taken]) for name, taken in seconds.items()}


def merge(parts: list[Summary]) -> Summary:
    """Those of several sets of ranks together: no larger, however many ranks there are. Nothing where a phase lacks."""
    whole = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        there = [part[name] for part in parts if name in part]
        lacking = [0.0 for part in parts if name not in part for _ in next(iter(part.values()), (0, 0, [0]))[2]]
        samples = sorted([*lacking, *(each for _, _, some in there for each in some)])
        if len(samples) > SAMPLES:
            samples = [samples[(2 * n + 1) * len(samples) // (2 * SAMPLES)] for n in range(SAMPLES)]
        worst, rank, _ = max(there, key=lambda each: (each[0], -each[1]))
        whole[name] = (worst, rank, samples)
    return whole


def _merged(values: list[bytes]) -> str:
    return json.dumps(merge([read_json(value) for value in values]))


def phases_of(whole: Summary) -> list[Phase]:
    """Each phase that any rank has, with the rank that took longest."""
    return [Phase(name, worst, rank, median(samples)) for name, (worst, rank, samples) in whole.items()]


def line(phases: list[Phase], total: float) -> str:
    """The start-up on one line: "start-up 7.9 s: imports 1.8 s, model 5.1 s on rank 3, median 2.0 s, ..."."""
    return f"start-up {total:.1f} s: " + ", ".join(map(str, phases))
