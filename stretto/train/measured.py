"""What a run measures of its own pipeline: costs for `--schedule auto`, and the timeline of profiled steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from stretto.exchange import all_gather_json, broadcast_json
from stretto.notation.profile import ProfileWindow
from stretto.pipeline_parallel import Executor, hop_seconds
from stretto.schedule import (
    Action,
    Cost,
    Op,
    Schedule,
    ScheduleError,
    Sharding,
    Span,
    check_lowered,
    lower,
    simulate,
    step_time,
)
from stretto.schedule.measured import Measured, computations, cost_of, stage_times
from stretto.terminal import say
from stretto.train.step import Stepper

WARM_UP: Final = 1
"""Steps before those that are measured: the first compiles and allocates."""
MEASURED: Final = 2


@dataclass
class Tuner:
    """Takes a run from the schedule that it began with to the one that `search` finds for what its stages take.

    After a few steps all ranks tell what their stages took; rank 0 searches, once, and tells all the order, so that no
    two ranks can have different ones. The update does not change: microbatches add up in the same order in all.
    """

    stepper: Stepper
    sharding: Sharding
    search: Callable[[Cost], Schedule]
    keep: Callable[[Cost], object] = bool
    """Told of the costs, on rank 0."""
    cost: Cost | None = field(default=None, init=False)
    """What was agreed on."""
    _begun: int = field(default=0, init=False)

    def begin(self, _: int) -> None:
        """A step is about to be launched."""
        self._begun += 1
        if self._begun == 1 + WARM_UP:
            self.stepper.executor.clock.start()
        elif self._begun == 1 + WARM_UP + MEASURED:
            self._tune()

    def _tune(self) -> None:
        executor, state = self.stepper.executor, self.stepper.state
        world = state.axis("tp", "cp", "dp", "pp")
        own = stage_times(span for step in executor.clock.stop() for span in step)
        told = all_gather_json([own, _hop(executor)], world)
        stages = executor.program.num_stages
        cost = cost_of((times for times, _ in told), stages, hop=max(hop for _, hop in told))
        self.cost = cost = replace(cost, barrier=self.stepper.proven)
        found = self._found(cost) if world.rank == 0 else None
        if world.rank == 0:
            self.keep(cost)
        schedule = Schedule.parse(broadcast_json(str(found), world))
        program = lower(schedule, self.sharding, cost)
        check_lowered(program, self.sharding)
        self.stepper.executor = executor.playing(program)
        self.stepper.weights.follow(visits(program, executor.rank))

    def _found(self, cost: Cost) -> Schedule:
        """The quickest for these costs; the order that the run began with, where the search finds nothing quicker."""
        begun = computations(self.stepper.executor.program)
        try:
            found = self.search(cost)
        except ScheduleError:  # no known order keeps within the memory for these costs: this one does
            return begun
        return min(found, begun, key=lambda s: step_time(simulate(s, cost)))


@dataclass
class StepTimeline:
    """The timeline of the steps in a window, written by rank 0 to `timeline.json` in `directory`."""

    window: ProfileWindow
    stepper: Stepper
    directory: Path
    _executor: Executor | None = field(default=None, init=False)

    def begin(self, step: int) -> None:
        """A step is about to be launched; all ranks together."""
        inside = step in self.window.steps
        if inside and self._executor is None:
            self._executor = self.stepper.executor
            self._executor.clock.start()
        elif not inside:
            self.finish()

    def finish(self) -> None:
        """Write what was recorded, if anything was; all ranks together."""
        executor, self._executor = self._executor, None
        if executor is None:
            return
        measured = recorded(executor)
        if self.stepper.state.world.rank:
            return
        if executor is not self.stepper.executor:
            say("no timeline was written: --schedule auto took its schedule within the steps of --profile")
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "timeline.json").write_text(measured.text(), encoding="utf-8")


def recorded(executor: Executor) -> Measured:
    """The steps since the executor's clock was started, of all ranks, and what a message takes; the clock stops.

    All ranks of a pipeline together, between steps.
    """
    own = [[[str(x.action), x.start, x.end] for x in step] for step in executor.clock.stop()]
    told, hop = all_gather_json(own, executor.link.axis), _hop(executor)
    steps = [
        [Span(rank, Action.parse(a), start, end) for rank, ranks in enumerate(told) for a, start, end in ranks[n]]
        for n in range(len(own))
    ]
    return Measured.of(executor.program, steps, hop)


def _hop(executor: Executor) -> float:
    """Of a message between the stages that take longest for one; all ranks of a pipeline together."""
    axis = executor.link.axis
    sizes = all_gather_json([stage.received for stage in executor.stages.values()], axis)
    own = hop_seconds(executor.link, max(size for each in sizes for size in each))
    return float(max(all_gather_json(own, axis)))


def visits(program: Schedule, rank: int) -> dict[int, list[bool]]:
    """Of each UNSHARD of a stage on a pipeline rank, in order: whether a backward is the first use of it."""
    found: dict[int, list[bool]] = {}
    begun: set[int] = set()
    for action in program.ranks[rank]:
        if action.op is Op.UNSHARD:
            begun.add(action.stage)
        elif action.stage in begun and action.op in (Op.F, Op.B, Op.I):
            begun.remove(action.stage)
            found.setdefault(action.stage, []).append(action.op is not Op.F)
    return found
