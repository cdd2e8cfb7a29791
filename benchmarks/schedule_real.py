"""Steps of `stretto train` under each schedule, beside those that its simulation makes of the costs of its stages.

Nothing is padded: the model is a shape of `benchmarks.train`, in the loop of `stretto train`. Under each schedule some
steps warm up. Two more tell what F, B, I and W of each stage take, by events on the device where there is one, between
the wait for a message and the end of the computation; then what a message takes between ranks that have nothing else
to do, and the norm and update of a step that follow its last gradient. From these alone the step is predicted: the
simulated order, and norm and update behind it. Then steps are timed, one right after the other.

Schedules that place their stages alike share a model, so that each costs seconds. `auto` has one of its own: it begins
as in `stretto train`, and takes its schedule within the warm-up.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.train.measure import step_times, synchronize
from benchmarks.train.peers import peak_of
from benchmarks.train.peers.stretto_peer import Peer, words_of
from benchmarks.train.shapes import Job
from benchmarks.train.worker import device_name, versions
from stretto.arguments import parse
from stretto.arguments.schema import Arguments
from stretto.distributed import grad_norm
from stretto.estimate import rank_ledger, stage_counts
from stretto.exchange import all_gather_json
from stretto.initialize import initialize
from stretto.schedule import (
    DDP,
    Cost,
    Schedule,
    Timeline,
    bubble,
    lower,
    makespan,
    schedule_for,
    simulate,
    step_time,
)
from stretto.schedule.blocks import counts_text
from stretto.schedule.measured import Measured
from stretto.train.measured import MEASURED, WARM_UP, recorded, visits
from stretto.train.step import sum_over_world
from stretto.world import World

UPDATES = 6
"""Of which the first warms up: measured apart."""
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank of the device."""

    rest: int
    """Between steps."""
    peak: int
    predicted: int
    """The most, by `stretto.estimate`."""
    activations: int
    """Of these: what forwards keep, and what the layer at work has made."""


@dataclass(frozen=True)
class Row:
    """Of one schedule; seconds."""

    name: str
    layers: Sequence[float]
    """Of each stage."""
    placement: list[int]
    cost: Cost
    """Of the stages and a message, measured before the steps that are timed."""
    norm: float
    """Of the gradients' norm, loss and votes, over all ranks."""
    update: list[float]
    """Of each rank."""
    steps: list[float]
    """All that were timed, on the slowest rank."""
    measured: float
    """Their median."""
    simulated: float
    """The computations and messages, then norm and update."""
    error: float
    """Of the simulated step."""
    span: float
    """From the first computation of any rank to the end of the last, in the timed step that is typical."""
    span_simulated: float
    span_of_timed: float
    """Simulated with costs of the timed steps themselves: what is missing to `span` is no change of the costs."""
    bubble: float
    """Of this span, over all ranks."""
    bubble_simulated: float
    memory: list[Memory] = field(default_factory=list)
    """Of each rank, on a GPU."""


@dataclass(frozen=True)
class Plan:
    """What is measured: these schedules of a job, so many steps of each."""

    job: Job
    names: tuple[str, ...]
    warm: int = 3
    steps: int = 6
    words: str = ""
    """Further words of `stretto train`."""

    def arguments(self, name: str) -> Arguments:
        """As `stretto train` has them."""
        more = [*self.words.split(), "--schedule", name]
        return parse([*words_of(self.job), *more], env={}, world_size=self.job.nproc, files=False).args

    def placed(self, name: str) -> tuple[bool, int, str, list[float]]:
        """Schedules that agree in this share a model."""
        args = self.arguments(name)
        return name == "auto", args.parallel.stages_per_rank, args.parallel.shape, stage_counts(args)

    def __post_init__(self) -> None:
        if self.warm < 1:
            raise ValueError(f"warm={self.warm}: the first step compiles and allocates, so at least one warms up")


def measure(plan: Plan, out: Path | None, timelines: Path | None = None) -> int:
    """All schedules of the plan on this rank; rank 0 prints a table and keeps `out` up to date."""
    device = plan.job.device
    with initialize(device=device, threads=1 if device == "cpu" else None) as world:
        rows: list[Row] = []
        for row, measured in rows_of(plan, world):
            rows.append(row)
            if world.rank == 0:
                print(said(row), flush=True)
                if out is not None:
                    write(out, plan, rows, world)
                if timelines is not None:
                    timelines.mkdir(parents=True, exist_ok=True)
                    (timelines / f"{row.name}.json").write_text(measured.text(), encoding="utf-8")
        if world.rank == 0:
            print(table(rows))
    return 0


def rows_of(plan: Plan, world: World) -> Iterator[tuple[Row, Measured]]:
    """Of each schedule: what it took, and when each computation of the timed steps ran. All ranks together."""
    for (auto, *_), names in groupby(sorted(plan.names, key=plan.placed), plan.placed):
        alike = list(names)
        with set_up(plan, alike[0], world) as peer:
            for name in alike:
                if not auto:
                    stages = peer.args.parallel.stages_per_rank
                    play(peer, schedule_for(name, plan.job.nproc, plan.job.shape.microbatches(1), stages))
                yield row_of(plan, name, peer, world)


@contextmanager
def set_up(plan: Plan, name: str, world: World) -> Iterator[Peer]:
    """The model of this schedule, with the loop that trains it."""
    peer = Peer(f"{plan.words} --schedule {name}")
    peer.setup(plan.job, world)
    try:
        yield peer
    finally:
        peer.close()
        del peer.built, peer.loop
        gc.collect()  # modules and their hooks refer to each other
        if plan.job.device == "cuda":
            torch.cuda.empty_cache()


def play(peer: Peer, schedule: Schedule) -> None:
    """From the next step on the model trains by this schedule."""
    stepper = peer.built.stepper
    program = lower(schedule, DDP)
    stepper.executor = stepper.executor.playing(program)
    stepper.weights.follow(visits(program, stepper.executor.rank))


def row_of(plan: Plan, name: str, peer: Peer, world: World) -> tuple[Row, Measured]:
    """Warm up, measure costs, predict, time."""
    tuner, device = peer.built.tuner, world.device
    pipeline = peer.state.axis("pp")
    # A tuner measures, searches, and changes the order at the beginning of a step, which announces its messages.
    step_times(peer.step, plan.warm + (WARM_UP + MEASURED if tuner else 0), device)
    _, before = steps_of(peer, MEASURED, device)
    cost = before.cost()
    norm, update = after_gradients(peer, device)
    told = all_gather_json([norm, update], pipeline)
    norm, updates = max(n for n, _ in told), [u for _, u in told]
    order = before.schedule
    timeline = simulate(order, cost)
    simulated = predicted(timeline, norm, updates)

    synchronize(device)
    rest = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    own, after = steps_of(peer, plan.steps, device)
    ledger = rank_ledger(plan.arguments(name), world.rank)
    mine = [own, [rest, peak_of(plan.job.device), ledger.total, ledger.activations + ledger.working]]
    ranks = all_gather_json(mine, pipeline)
    steps = [max(each) for each in zip(*(taken for taken, _ in ranks), strict=True)]
    typical, taken = after.typical, median(steps)
    row = Row(
        name=name,
        layers=stage_counts(peer.args),
        placement=list(order.placement),
        cost=cost,
        norm=norm,
        update=updates,
        steps=steps,
        measured=taken,
        simulated=simulated,
        error=simulated / taken - 1,
        span=makespan(typical),
        span_simulated=makespan(timeline),
        span_of_timed=makespan(simulate(order, after.cost())),
        bubble=bubble(typical),
        bubble_simulated=bubble(timeline),
        memory=[Memory(*bytes_) for _, bytes_ in ranks] if device.type == "cuda" else [],
    )
    return row, after


def steps_of(peer: Peer, count: int, device: torch.device) -> tuple[list[float], Measured]:
    """Seconds of so many steps on this rank, and their timeline on all."""
    executor = peer.built.stepper.executor
    executor.clock.start()
    times = step_times(peer.step, count, device)
    return [1e-3 * ms for ms in times], recorded(executor)


def predicted(timeline: Timeline, norm: float, updates: Sequence[float]) -> float:
    """Seconds from one step to the next, with the norm behind the last computation of all and an update on each rank.

    A rank whose first computation is not the first of the step can update while others compute already.
    """
    first = timeline.start[timeline.table.first[:-1]].tolist()
    finish = norm + max(update - begins for update, begins in zip(updates, first, strict=True))
    return step_time(timeline, Cost(finish=finish))


def after_gradients(peer: Peer, device: torch.device) -> tuple[float, float]:
    """Seconds of what follows the last gradient: the norm and what else all ranks agree on, and this rank's update."""
    stepper = peer.built.stepper
    zero = torch.zeros((), device=device)

    def agree() -> None:
        grad_norm(stepper.weights)
        sum_over_world(zero, stepper.state, stepper.further)

    def update() -> None:
        stepper.optimizer.step(0.0, zero + 1)  # learns nothing, and takes as long

    def each(work: Callable[[], None]) -> float:
        return 1e-3 * median(step_times(work, UPDATES, device)[1:])

    return each(agree), each(update)


def said(row: Row) -> str:
    """One line."""
    return (
        f"{row.name:15} {1e3 * row.measured:.1f} ms, simulated {1e3 * row.simulated:.1f} ms ({row.error:+.1%}); "
        f"bubble {row.bubble:.1%}, simulated {row.bubble_simulated:.1%}"
    )


def table(rows: list[Row]) -> str:
    """Of all, as documents have it."""
    on_device = any(row.memory for row in rows)
    lines = [
        "| schedule | layers | measured, ms | simulated | error | bubble | simulated |"
        + (" peak GiB | predicted |" if on_device else ""),
        "|---|---|---|---|---|---|---|" + ("---|---|" if on_device else ""),
    ]
    for r in rows:
        shares = f"{r.error:+.1%} | {r.bubble:.1%} | {r.bubble_simulated:.1%}"
        figures = f"{1e3 * r.measured:.1f} | {1e3 * r.simulated:.1f} | {shares}"
        peaks = ([m.peak for m in r.memory], [m.predicted for m in r.memory]) if on_device else ()
        both = "".join(f" {' '.join(f'{x / GIB:.1f}' for x in each)} |" for each in peaks)
        lines.append(f"| `{r.name}` | {counts_text(r.layers)} | {figures} |{both}")
    return "\n".join(lines)


def write(out: Path, plan: Plan, rows: list[Row], world: World) -> None:
    """All that is there so far: a session that is cut leaves what was measured."""
    out.parent.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"device": device_name(world.device), "versions": versions(), "cores": os.cpu_count()}
    told = {"plan": asdict(plan), **about, "rows": [asdict(row) for row in rows]}
    out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
