"""The best order there is for small pipelines, by a constraint solver (OR-tools, `pip install stretto[exact]`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stretto.layout.stages import Shape, placement
from stretto.schedule.actions import Action, Op
from stretto.schedule.costs import Cost
from stretto.schedule.ir import Schedule
from stretto.schedule.search import Found, search
from stretto.schedule.simulate import simulate, step_time

_TICKS = 10_000  # per longest action: costs are rounded down, so a bound is one; the result is simulated with true ones
_EXACT = 1e-6  # of a tick: what floats leave below a whole number of them


def solve(
    p: int, v: int, m: int, cost: Cost, cap: Sequence[int], shape: Shape = "loop", *, seconds: float = 30.0
) -> Found:
    """The quickest schedule of split backwards under these caps, and the proven bound after so many seconds.

    Begins from what `search` finds, and is never slower than that. Raises ImportError without OR-tools, and
    ScheduleError where nothing keeps within the caps.
    """
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        raise ImportError("the exact solver needs OR-tools: pip install 'stretto[exact]'") from error
    known = search(p, v, m, cost, cap, shape)
    model = _Model(cp_model, p, v, m, cost, cap, shape)
    model.hint(known.schedule, cost)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = 2
    status = solver.solve(model.model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return known
    order = model.schedule(solver)
    bound = max(known.bound, solver.best_objective_bound / model.scale + cost.finish)
    time = step_time(simulate(order, cost), cost)
    if time >= known.time:
        return Found(known.schedule, known.origin, known.time, bound)
    return Found(order, "solver", time, bound)


class _Model:
    """Starts of all actions: one at a time on each rank, after what they need, within the memory of the rank."""

    def __init__(self, cp_model: Any, p: int, v: int, m: int, cost: Cost, cap: Sequence[int], shape: Shape) -> None:
        self.home, self.m = placement(p, v, shape), m
        stages = np.arange(len(self.home))
        times = {op: cost.times(stages, np.full(len(stages), list(Op).index(op))) for op in (Op.F, Op.I, Op.W)}
        self.scale = _TICKS / max(float(t.max()) for t in times.values())
        ticks = {op: [int(float(t) * self.scale + _EXACT) for t in column] for op, column in times.items()}
        hop = int(cost.message * self.scale + _EXACT)
        horizon = sum(sum(column) for column in ticks.values()) * m + 2 * hop * len(self.home) * m
        self.model = model = cp_model.CpModel()
        self.start: dict[Action, Any] = {}
        intervals: list[list[Any]] = [[] for _ in range(p)]
        for op, column in ticks.items():
            for s, long in enumerate(column):
                for mb in range(m):
                    a = Action(s, op, mb)
                    self.start[a] = model.new_int_var(0, horizon, str(a))
                    intervals[self.home[s]].append(model.new_fixed_size_interval_var(self.start[a], long, str(a)))
        for own in intervals:
            model.add_no_overlap(own)
        self._precedence(ticks, hop)
        for rank in range(p):
            self._memory([s for s in stages.tolist() if self.home[s] == rank], cap[rank], ticks[Op.W], horizon)
        end = model.new_int_var(0, horizon, "end")
        for a, at in self.start.items():
            if a.op is Op.W and a.mb == m - 1:
                model.add(end >= at + ticks[Op.W][a.stage])
        model.minimize(end)

    def _precedence(self, ticks: dict[Op, list[int]], hop: int) -> None:
        for a, at in self.start.items():
            before = [Action(a.stage, a.op, a.mb - 1)] if a.mb else []  # microbatches are alike: in their order
            if a.op is Op.F and a.stage:
                before.append(Action(a.stage - 1, Op.F, a.mb))
            if a.op is Op.I:
                last = a.stage == len(self.home) - 1
                before.append(Action(a.stage, Op.F, a.mb) if last else Action(a.stage + 1, Op.I, a.mb))
            if a.op is Op.W:
                before.append(Action(a.stage, Op.I, a.mb))
            for other in before:
                wait = hop * (self.home[a.stage] != self.home[other.stage])
                self.model.add(at >= self.start[other] + ticks[other.op][other.stage] + wait)

    def _memory(self, stages: list[int], cap: int, ticks: list[int], horizon: int) -> None:
        """An activation lives from its F to the end of its W."""
        held = [
            self.model.new_interval_var(
                self.start[Action(s, Op.F, mb)],
                self.model.new_int_var(0, horizon, ""),
                self.start[Action(s, Op.W, mb)] + ticks[s],
                "",
            )
            for s in stages
            for mb in range(self.m)
        ]
        self.model.add_cumulative(held, [1] * len(held), cap)

    def hint(self, s: Schedule, cost: Cost) -> None:
        """Begin from this schedule."""
        for span in simulate(s, cost):
            if span.action in self.start:
                self.model.add_hint(self.start[span.action], round(span.start * self.scale))

    def schedule(self, solver: Any) -> Schedule:
        """The order of the solution."""
        ranks: list[list[Action]] = [[] for _ in range(max(self.home) + 1)]
        for a in sorted(self.start, key=lambda a: (solver.value(self.start[a]), list(Op).index(a.op))):
            ranks[self.home[a.stage]].append(a)
        return Schedule(self.home, self.m, ranks)
