"""List scheduling: let each rank take what is ready, in the order of a schedule that is known to be right."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from heapq import heapify, heappop, heappush

import numpy as np

from stretto.schedule.actions import OPS, B, F, I, W, encode
from stretto.schedule.costs import Cost
from stretto.schedule.ir import Schedule, ScheduleError


def squeeze(s: Schedule, cost: Cost | None = None, cap: Sequence[int] | None = None) -> Schedule:
    """The same computation in an order that leaves less idle under `cost`.

    Forwards keep their order. A rank that is free takes, of the next forward and the backwards that are ready, the one
    that `s` has first; if none is, a weight gradient. It holds at most `cap[rank]` activations, as many as in `s` by
    default: then there is always a way to the end, because the first action in the order of `s` that is not done can
    be. Raises ScheduleError where a lower cap leaves none.
    """
    return Squeeze(s, cost or Cost(), most_alive(s) if cap is None else cap).run()


def most_alive(s: Schedule) -> list[int]:
    """For each rank, the most activations that it holds at once, by its order alone."""
    change = np.select([s.table.op == F, (s.table.op == B) | (s.table.op == W)], [1, -1])
    ends = s.table.first[1:-1]
    return [int(np.cumsum(part).max(initial=0)) for part in np.split(change, ends)]


class Squeeze:
    """One pass: ranks are woken in the order of time, by their own end or by a message."""

    def __init__(self, s: Schedule, cost: Cost, cap: Sequence[int]) -> None:
        self.s, self.cap, t = s, cap, s.table
        stages, ops = np.indices((s.num_stages, len(OPS)))
        times = cost.times(stages.ravel(), ops.ravel())
        self.time: list[list[float]] = times.reshape(s.num_stages, len(OPS)).tolist()
        self.message = cost.message
        key = np.arange(len(t)) - t.first[t.rank]
        rows = np.flatnonzero((t.op == B) | (t.op == I))
        columns = (t.stage[rows].tolist(), t.mb[rows].tolist(), key[rows].tolist(), t.op[rows].tolist())
        self.back = {(stage, mb): (k, op) for stage, mb, k, op in zip(*columns, strict=True)}
        rows = np.flatnonzero(t.op == F)
        self.forwards: list[deque[tuple[int, int, int]]] = [deque() for _ in s.ranks]
        columns = (t.rank[rows].tolist(), key[rows].tolist(), t.stage[rows].tolist(), t.mb[rows].tolist())
        for rank, *forward in zip(*columns, strict=True):
            self.forwards[rank].append((forward[0], forward[1], forward[2]))
        self.arrived: dict[tuple[int, int], float] = {(0, mb): 0.0 for mb in range(s.num_microbatches)}
        self.waiting: list[list[tuple[int, float, int, int, int]]] = [[] for _ in s.ranks]
        self.owed: list[deque[tuple[int, int]]] = [deque() for _ in s.ranks]
        self.live = [0] * s.num_ranks
        self.clock = [0.0] * s.num_ranks
        self.codes: list[list[int]] = [[] for _ in s.ranks]
        self.heap: list[tuple[float, int]] = [(0.0, rank) for rank in range(s.num_ranks)]
        heapify(self.heap)

    def run(self) -> Schedule:
        while self.heap:
            now, rank = heappop(self.heap)
            if now < self.clock[rank]:
                continue
            wake = self._next(rank, now)
            if wake is not None:
                heappush(self.heap, (wake, rank))
        if (left := self.s.num_actions - sum(map(len, self.codes))) > 0:
            raise ScheduleError(f"{left} actions find no place under the caps {list(self.cap)}")
        return Schedule(self.s.placement, self.s.num_microbatches, [np.array(codes, np.int64) for codes in self.codes])

    def _next(self, rank: int, now: float) -> float | None:
        """Run one action; when to look at this rank again, if that is known."""
        wakes: list[float] = []
        best: tuple[int, float, int, int, int] | None = None
        if self.forwards[rank] and self.live[rank] < self.cap[rank]:
            key, stage, mb = self.forwards[rank][0]
            if (at := self.arrived.get((stage, mb))) is not None:
                best, wakes = ((key, at, stage, mb, F), wakes) if at <= now else (best, [at])
        for each in self.waiting[rank]:
            if each[1] > now:
                wakes.append(each[1])
            elif best is None or each[0] < best[0]:
                best = each
        if best is None and self.owed[rank]:
            stage, mb = self.owed[rank].popleft()
            best = (0, now, stage, mb, W)
        if best is None:
            return min(wakes, default=None)
        self._run(rank, now, best)
        return self.clock[rank]

    def _run(self, rank: int, now: float, action: tuple[int, float, int, int, int]) -> None:
        _, _, stage, mb, op = action
        end = self.clock[rank] = now + self.time[stage][op]
        self.codes[rank].append(int(encode(stage, op, mb)))
        if op == F:
            self.forwards[rank].popleft()
            self.live[rank] += 1
            if stage < self.s.num_stages - 1:
                at = self._hand_on(rank, stage + 1, end)
                self.arrived[stage + 1, mb] = at
            else:
                self._to_go_back(rank, stage, mb, end)
            return
        if op != I:
            self.live[rank] -= 1
        if op == W:
            return
        self.waiting[rank].remove(action)
        if op == I:
            self.owed[rank].append((stage, mb))
        if stage:
            self._to_go_back(self.s.placement[stage - 1], stage - 1, mb, self._hand_on(rank, stage - 1, end))

    def _hand_on(self, rank: int, stage: int, end: float) -> float:
        """When a result is at the stage; its rank looks then."""
        to = self.s.placement[stage]
        at = end if to == rank else end + self.message
        if to != rank:
            heappush(self.heap, (max(at, self.clock[to]), to))
        return at

    def _to_go_back(self, rank: int, stage: int, mb: int, at: float) -> None:
        key, op = self.back[stage, mb]
        self.waiting[rank].append((key, at, stage, mb, op))
