"""Play a schedule against a clock, without a device: when does each action run, and what is left idle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np

from stretto.schedule.actions import Action, Ints, Op
from stretto.schedule.costs import Cost, Times
from stretto.schedule.ir import Schedule, ScheduleError, Table
from stretto.schedule.requires import needs


@dataclass(frozen=True, slots=True)
class Span:
    """One action in time: it keeps its rank busy from `start` to `end`."""

    rank: int
    action: Action
    start: float
    end: float


class DeadlockError(ScheduleError):
    """No rank can go on. `blocked` are the actions at which ranks stand."""

    def __init__(self, blocked: Sequence[Action], message: str) -> None:
        super().__init__(message)
        self.blocked = tuple(blocked)


class Timeline(Sequence[Span]):
    """When every action runs; as a sequence, spans in an order in which they could happen one after another."""

    def __init__(self, table: Table, start: Times, end: Times, order: Ints) -> None:
        self.table, self.start, self.end, self.order = table, start, end, order

    def __len__(self) -> int:
        return len(self.order)

    @cached_property
    def _spans(self) -> list[Span]:
        t, at = self.table, self.order
        columns = (t.rank[at].tolist(), t.codes[at].tolist(), self.start[at].tolist(), self.end[at].tolist())
        return [Span(rank, Action.of_code(code), a, b) for rank, code, a, b in zip(*columns, strict=True)]

    def __iter__(self) -> Iterator[Span]:
        return iter(self._spans)

    @overload
    def __getitem__(self, at: int) -> Span: ...
    @overload
    def __getitem__(self, at: slice) -> list[Span]: ...
    def __getitem__(self, at: int | slice) -> Span | list[Span]:
        return self._spans[at]


def simulate(s: Schedule, cost: Cost | None = None) -> Timeline:
    """When every action runs if each rank does its list in order, each action as early as `requires` lets it.

    One pass over the actions, once for each cost: the schedule keeps the result. Raises `DeadlockError`, naming for
    every rank that is stuck its next action and what that waits for.
    """
    cost = cost or Cost()
    if (played := s.table.played.get(cost)) is None:
        played = s.table.played[cost] = _simulated(s, cost)
    return played


def _simulated(s: Schedule, cost: Cost) -> Timeline:
    table = s.table
    found = needs(table.codes, np.arange(len(table)), table)
    places = np.stack([table.find(row) for row in found])
    position = np.arange(len(table))
    # What a rank requires of itself must stand before it in its list; what comes from elsewhere takes time.
    here = (places >= 0) & (table.rank[places] == table.rank)
    never = ((found >= 0) & (places < 0)) | (here & (places >= position))
    waits = np.where((found[2] >= 0) & ~here[2], places[2], -1)
    waits[never.any(axis=0)] = len(table)
    start, end, order = _play(table, waits, cost)
    if len(order) < len(table):
        _raise_deadlock(table, found, places, order)
    return Timeline(table, np.asarray(start), np.asarray(end), np.asarray(order, np.int64))


def _play(table: Table, waits: Ints, cost: Cost) -> tuple[list[float], list[float], list[int]]:
    """Starts, ends, and the order in which actions ended, until no rank can go on. Position n never happens."""
    source, time = waits.tolist(), cost.times(table.stage, table.op).tolist()
    start, end = [0.0] * len(table), [-1.0] * (len(table) + 1)
    link = _links(table, waits) if cost.transfer else None
    free: dict[int, float] = {}
    arrives = end if link is None else [-1.0] * (len(table) + 1)  # at the other end of its link, but for the latency
    at, last = table.first[:-1].tolist(), table.first[1:].tolist()
    clock = [0.0] * len(at)
    waiter = [-1] * (len(table) + 1)  # each result goes to one other rank at most
    order: list[int] = []
    ready = list(range(len(at)))[::-1]
    hop, append = cost.hop, order.append
    while ready:
        rank = ready.pop()
        now, i, stop = clock[rank], at[rank], last[rank]
        while i < stop:
            n = source[i]
            if n >= 0:
                arrival = arrives[n]
                if arrival < 0:
                    waiter[n] = rank
                    break
                arrival += hop
                if arrival > now:
                    now = arrival
            start[i] = now
            now += time[i]
            end[i] = now
            append(i)
            if link is not None and (on := link[i]) >= 0:
                arrives[i] = free[on] = max(now, free.get(on, 0.0)) + cost.transfer
            if waiter[i] >= 0:
                ready.append(waiter[i])
            i += 1
        clock[rank], at[rank] = now, i
    return start, end[:-1], order


def _links(table: Table, waits: Ints) -> list[int]:
    """Over which link, a pair of ranks in one direction, each action's result goes; -1 of one that stays."""
    links = np.full(len(table) + 1, -1, np.int64)
    users = np.flatnonzero(waits >= 0)
    links[waits[users]] = table.rank[waits[users]] * (len(table.first) - 1) + table.rank[users]
    found: list[int] = links[:-1].tolist()
    return found


def _raise_deadlock(table: Table, found: Ints, places: Ints, order: list[int]) -> None:
    done = np.zeros(len(table) + 1, bool)  # the last stands for what is not there
    done[order] = True
    heads = [first + int(done[first:last].sum()) for first, last in zip(table.first, table.first[1:], strict=False)]
    stuck = [int(i) for i, last in zip(heads, table.first[1:], strict=True) if i < last]
    blocked = [Action.of_code(int(table.codes[i])) for i in stuck]
    lacks = (
        [
            Action.of_code(code)
            for code, at in zip(found[:, i].tolist(), places[:, i], strict=True)
            if code >= 0 and not done[at]
        ]
        for i in stuck
    )
    text = "; ".join(f"{a} waits for {' '.join(map(str, needs))}" for a, needs in zip(blocked, lacks, strict=True))
    raise DeadlockError(blocked, f"deadlock: {text}")


def makespan(spans: Sequence[Span]) -> float:
    """When the last action ends."""
    return float(spans.end.max()) if isinstance(spans, Timeline) else max(span.end for span in spans)


def step_time(spans: Timeline, cost: Cost | None = None, *, barrier: bool | None = None) -> float:
    """From one step to the next: until the last action of any rank and what finishes the step.

    Without the barrier of a gradient norm (None: as the cost says) no rank waits for the others: the next step begins
    on each as soon as its own actions are over, and steps follow each other like tiles.
    """
    finish = cost.finish if cost else 0.0
    if barrier if barrier is not None else cost is None or cost.barrier:
        return makespan(spans) + finish
    bounds = list(zip(spans.table.first[:-1].tolist(), spans.table.first[1:].tolist(), strict=True))
    return finish + max(float(spans.end[a:b].max() - spans.start[a:b].min()) for a, b in bounds)


def bubble(spans: Sequence[Span]) -> float:
    """The part of all ranks' time that they idle, until the last action of any ends: 0 to 1."""
    if isinstance(spans, Timeline):
        ranks, busy = len(spans.table.first) - 1, float((spans.end - spans.start).sum())
    else:
        ranks, busy = 1 + max(span.rank for span in spans), sum(span.end - span.start for span in spans)
    return 1 - busy / (ranks * makespan(spans))


def peak_live(spans: Sequence[Span]) -> tuple[int, ...]:
    """For each rank, the most activations (of one stage and one microbatch each) that it holds at once.

    An activation lives from its F to the end of its B, or of its W where the backward is split.
    """
    live = [0] * (1 + max(span.rank for span in spans))
    peak = list(live)
    for span in spans:
        live[span.rank] += {Op.F: 1, Op.B: -1, Op.W: -1}.get(span.action.op, 0)
        peak[span.rank] = max(peak[span.rank], live[span.rank])
    return tuple(peak)
