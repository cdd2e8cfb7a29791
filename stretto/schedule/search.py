"""The order that is quickest for given costs, under a cap on activations: never worse than the best by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from stretto.layout.stages import Shape, placement
from stretto.schedule import families, vshape
from stretto.schedule.actions import B, F, I, W, encode, mbs_of, ops_of, stages_of
from stretto.schedule.costs import Cost, Times
from stretto.schedule.generators import GENERATORS, schedule_for
from stretto.schedule.greedy import most_alive, squeeze
from stretto.schedule.ir import Schedule, ScheduleError
from stretto.schedule.simulate import DeadlockError, simulate, step_time

REORDERED: Final = 1_000_000
"""Actions that a search reorders, or a schedule more: a number and not seconds, so that all ranks find the same."""
_VARIANTS: Final = 4
"""Reorderings of a schedule, at most."""


@dataclass(frozen=True)
class Found:
    """A schedule, what it came from, its time, and a time that no schedule of these stages can beat."""

    schedule: Schedule
    origin: str
    time: float
    bound: float

    @property
    def gap(self) -> float:
        """How far the time may be from the best there is: 0.02 is 2 %."""
        return max(0.0, self.time / self.bound - 1) if self.bound else 0.0


def search(p: int, v: int, m: int, cost: Cost, cap: Sequence[int], shape: Shape = "loop") -> Found:
    """The quickest schedule found for these stages, of which rank r holds at most `cap[r]` activations at once.

    Starts from every schedule by name in this placement and some more, backwards whole and split, and lets `squeeze`
    reorder each for these costs and caps, until `REORDERED` actions are, or none can be quicker; the schedules by name
    are candidates themselves. Raises ScheduleError where none keeps within the caps.
    """
    best: tuple[float, str, Schedule] | None = None
    least = [m * v] * p

    def look(name: str, s: Schedule) -> float:
        nonlocal best, least
        held = most_alive(s)
        least = min(least, held, key=max)
        time = step_time(simulate(s, cost), cost)
        fits = all(has <= most for has, most in zip(held, cap, strict=True))
        if fits and (best is None or time < best[0] * (1 - 1e-9)):
            best = time, name, s
        return time

    starts, bound, left = [*_starts(p, v, m, shape)], lower_bound(p, v, m, cost, shape), REORDERED
    large = sum(_VARIANTS * s.num_actions for _, s in starts) > REORDERED
    if large:  # those that are quick as they are come first, and all of them are looked at
        starts.sort(key=lambda start: look(*start))
    for origin, start in starts:
        if not large:
            look(origin, start)
        for name, s in _variants(origin, start, cost, cap):
            look(name, s)
            left -= s.num_actions
            if large and (left <= 0 or (best is not None and best[0] <= bound * (1 + 1e-9))):
                break
        else:
            continue
        break
    if best is None:
        raise ScheduleError(
            f"no known schedule of {v} stages on each of {p} ranks in a {shape} keeps within {max(cap)} activations of "
            f"a stage; the least that one holds is {max(least)}"
        )
    return Found(best[2], best[1], best[0], bound)


def caps(p: int, v: int, memory: float | None) -> list[int]:
    """Activations of a stage that each rank may hold: of `memory` microbatches through all of its stages, by default
    as many as 1F1B has, p."""
    return [int((p if memory is None else memory) * v + 1e-9)] * p


def names_in(v: int, shape: Shape) -> list[str]:
    """The schedules by name that have so many stages on a rank, in this shape."""
    return [
        name
        for name, made in GENERATORS.items()
        if name != "auto" and (made.any_stages or made.stages == v) and (v == 1 or made.shape == shape)
    ]


def lower_bound(p: int, v: int, m: int, cost: Cost, shape: Shape = "loop") -> float:
    """No step is shorter: each rank has all of its work, with a barrier after the first forward has reached it; and one
    microbatch goes all the way there and back."""
    home = placement(p, v, shape)
    f, i, w, b = _per_stage(cost, len(home))
    halves = np.minimum(b, i + w)
    hops = np.array([cost.message * (a != c) for a, c in pairwise(home)] + [0.0])
    reach = np.concatenate([[0.0], np.cumsum(f[:-1] + hops[:-1])])  # when the first microbatch can be at a stage
    way = float(f.sum() + np.minimum(i, b).sum() + 2 * hops.sum())
    bounds = [way]
    for rank in range(p):
        mine = [s for s, holder in enumerate(home) if holder == rank]
        bounds.append(float(reach[mine[0]] * cost.barrier + m * (f[mine] + halves[mine]).sum()))
    return max(bounds) + cost.finish


def _per_stage(cost: Cost, stages: int) -> tuple[Times, Times, Times, Times]:
    every = np.arange(stages)
    f, i, w, b = (cost.times(every, np.full(stages, op)) for op in (F, I, W, B))
    return f, i, w, b


def _starts(p: int, v: int, m: int, shape: Shape) -> Iterator[tuple[str, Schedule]]:
    """By name first, so that of equals the known one is kept."""
    for name in names_in(v, shape):
        yield name, schedule_for(name, p, m, v)
    if v == 2 and shape == "v":
        for slopes in ((1, 1, 1, 1), (1, 2, 1, 2), (2, 2, 1, 1), (1, 3, 1, 3), (4, 2, 4, 2), (5, 5, 1, 1)):
            with suppress(ValueError):  # not for every p
                yield f"a block of slopes {slopes}", vshape.repeated(p, m, slopes)
    elif shape == "loop":
        for group in sorted({max(1, p // 2), p, p + 1, 2 * p}):
            if min(p, m) <= group <= m:
                yield f"groups of {group}", families.interleaved_zb(p, v, m, group)


def _variants(origin: str, s: Schedule, cost: Cost, cap: Sequence[int]) -> Iterator[tuple[str, Schedule]]:
    tight = [min(most, held) for most, held in zip(cap, most_alive(s), strict=True)]
    forms = (s, split(s)) if (s.table.op == B).any() else (s,)
    for form in forms:
        for caps in {tuple(cap), tuple(tight)}:
            try:
                yield f"{origin}, reordered", squeeze(form, cost, caps)
            except (ScheduleError, DeadlockError):  # these caps are below what this order needs
                continue


def split(s: Schedule) -> Schedule:
    """The same order with each whole backward as I and W."""
    orders = []
    for order in s.ranks:
        codes, whole = order.codes, ops_of(order.codes) == B
        stage, mb = stages_of(codes[whole]), mbs_of(codes[whole])
        halves = np.stack([encode(stage, I, mb), encode(stage, W, mb)], axis=1)
        pieces = np.stack([codes, np.full(len(codes), -1)], axis=1)
        pieces[whole] = halves
        flat = pieces.ravel()
        orders.append(flat[flat >= 0])
    return Schedule(s.placement, s.num_microbatches, orders)
