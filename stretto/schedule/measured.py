"""Measured steps: when each computation of each rank ran, and what each stage takes; both as files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from stretto.schedule.actions import COMPUTE, Action
from stretto.schedule.costs import Cost
from stretto.schedule.ir import Schedule, ScheduleError
from stretto.schedule.simulate import Span, Timeline, makespan

StageTimes = Mapping[str, Mapping[str, float]]
"""Seconds by stage and verb (F, B, I, W): what JSON can say."""
_BAD = (KeyError, TypeError, AttributeError, ValueError)


@dataclass(frozen=True)
class Measured:
    """Steps of one schedule on its ranks, in seconds since each step's first computation; `hop`: of a message."""

    schedule: Schedule
    steps: tuple[Timeline, ...]
    hop: float = 0.0

    @classmethod
    def of(cls, schedule: Schedule, steps: Sequence[Iterable[Span]], hop: float = 0.0) -> Measured:
        """From what was recorded of each step, all ranks together, in any order; messages do not count.

        Raises ScheduleError unless each step has every computation of the schedule once.
        """
        plain = computations(schedule)
        return cls(plain, tuple(_timeline(plain, list(step)) for step in steps), hop)

    @property
    def typical(self) -> Timeline:
        """The step of median length; of two the shorter."""
        return sorted(self.steps, key=makespan)[(len(self.steps) - 1) // 2]

    def cost(self) -> Cost:
        """What each stage took: medians over microbatches and steps."""
        taken = stage_times(span for step in self.steps for span in step)
        return cost_of([taken], self.schedule.num_stages, hop=self.hop)

    def text(self) -> str:
        """As JSON, which `read` takes."""
        steps = [[[x.rank, str(x.action), round(x.start, 7), round(x.end, 7)] for x in step] for step in self.steps]
        return json.dumps({"measured": {"schedule": str(self.schedule), "hop": self.hop, "steps": steps}})

    @classmethod
    def read(cls, text: str, name: str) -> Measured:
        """What `text` wrote to the file `name`. Raises ValueError for anything else."""
        try:
            kept = json.loads(text)["measured"]
            steps = [
                [Span(rank, Action.parse(a), start, end) for rank, a, start, end in step] for step in kept["steps"]
            ]
            if not steps:
                raise ValueError("it has no step")
            return cls.of(Schedule.parse(kept["schedule"]), steps, float(kept["hop"]))
        except _BAD as error:
            raise ValueError(
                f"{name} is no measured timeline ({error}); `stretto train --profile steps=10:13` writes one to "
                "profile/timeline.json, where there is a pipeline"
            ) from None


def computations(program: Schedule) -> Schedule:
    """The order that was lowered to this program."""
    orders = [[a for a in order if a.op in COMPUTE] for order in program.ranks]
    return Schedule(program.placement, program.num_microbatches, orders)


def stage_times(spans: Iterable[Span]) -> StageTimes:
    """The median time of each kind of computation of each stage."""
    found: dict[str, dict[str, list[float]]] = {}
    for span in spans:
        found.setdefault(str(span.action.stage), {}).setdefault(span.action.op, []).append(span.end - span.start)
    return {stage: {str(op): median(taken) for op, taken in kinds.items()} for stage, kinds in found.items()}


def cost_of(ranks: Iterable[StageTimes], stages: int, *, hop: float = 0.0) -> Cost:
    """The cost that follows from what all ranks measured: of those that hold one stage, the slowest counts.

    A whole backward that was not seen takes as long as its halves, and halves that were not seen are equal. Raises
    ValueError for a stage of which nothing was measured.
    """
    slowest: dict[tuple[int, str], float] = {}
    for each in ranks:
        for stage, kinds in each.items():
            for op, taken in kinds.items():
                slowest[int(stage), op] = max(taken, slowest.get((int(stage), op), 0.0))
    rows = []
    for s in range(stages):
        f, b, i, w = (slowest.get((s, op)) for op in ("F", "B", "I", "W"))
        if f is None or (b is None and (i is None or w is None)):
            raise ValueError(f"no forward and backward of stage {s} was measured")
        half = (b or 0.0) / 2
        i, w = half if i is None else i, half if w is None else w
        rows.append((f, i + w if b is None else b, i, w))
    forward, backward, inputs, weights = zip(*rows, strict=True)
    return Cost(forward, backward, inputs, weights, hop=hop)


def cost_text(cost: Cost, layers: Sequence[float] | None = None) -> str:
    """A cost as JSON, which `read_cost` takes; with the layers of each stage, costs of other splits follow from it."""
    return json.dumps({"costs": asdict(cost)} | ({"layers": list(layers)} if layers else {}), indent=1) + "\n"


def read_layers(text: str) -> tuple[float, ...] | None:
    """The layers of each stage that `cost_text` wrote down, if it did."""
    try:
        found = tuple(json.loads(text)["layers"])
    except _BAD:
        return None
    return found if found and all(type(n) in (int, float) and n >= 0 and not (2 * n) % 1 for n in found) else None


def read_cost(text: str, name: str, stages: int | None = None) -> Cost:
    """What `cost_text` wrote to the file `name`, or the costs of a measured timeline. Raises ValueError for anything
    else, and for costs of another number of stages."""
    try:
        found = json.loads(text)
        said: dict[str, Any] = {} if "measured" in found else found["costs"]
        said = {key: tuple(value) if isinstance(value, list) else value for key, value in said.items()}
        plain = Cost(**said)
    except _BAD as error:
        raise ValueError(f"{name} has no costs of stages ({error}); remove it to have them measured anew") from None
    cost = Measured.read(text, name).cost() if "measured" in found else plain
    if stages is not None and cost.num_stages not in (None, stages):
        raise ValueError(f"{name} has costs of {cost.num_stages} stages, but there are {stages}; name another file")
    return cost


def _timeline(schedule: Schedule, spans: Sequence[Span]) -> Timeline:
    found = {(span.rank, span.action): span for span in spans}
    wanted = [(rank, action) for rank, order in enumerate(schedule.ranks) for action in order]
    if len(spans) != len(wanted) or found.keys() != set(wanted):
        missing = [str(action) for rank, action in wanted if (rank, action) not in found]
        raise ScheduleError(f"{len(spans)} computations for {len(wanted)} in the schedule; missing: {missing[:3]}")
    start = np.array([found[each].start for each in wanted])
    end = np.array([found[each].end for each in wanted])
    return Timeline(schedule.table, start - start.min(), end - start.min(), np.argsort(end, kind="stable"))
