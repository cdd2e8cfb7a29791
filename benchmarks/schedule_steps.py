"""Steps of `stretto train` whose computations take what they are told to, beside the simulated ones.

Each forward and backward of the real model, over real messages, is followed by a sleep until its time is over: the
model is so small that it computes for a fraction of that. The rest of the step, the update and the norm of all
gradients too, is as it is in any run, and the simulation knows nothing of it. On a machine that others use a rank may
wait for a core after each sleep; with `realtime`, which takes rights, the kernel lets it run at once.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from stretto.arguments import Resolved, parse
from stretto.data.text import Text
from stretto.estimate import stage_counts
from stretto.initialize import initialize
from stretto.parallel_state import ParallelState
from stretto.pipeline_parallel import hop_seconds
from stretto.pipeline_parallel.stage import Stage
from stretto.report.header import layout_line
from stretto.schedule import Action, Cost, bubble, makespan, simulate
from stretto.schedule.measured import computations
from stretto.schedule.pieces import Pieces
from stretto.train.build import build
from stretto.train.groups import axes_of
from stretto.train.placing import placed
from stretto.train.record import Listener, StepRecord
from stretto.train.run import feed_of, trainer_of
from stretto.world import World

T = TypeVar("T")
STEPS = 4
"""The first warms up."""
MEASURES = 3
"""Steps after which `auto` changes its order, if it knows no costs."""


class Padded:
    """A stage whose computations take at least so long: F, B, I and W by name."""

    def __init__(self, stage: Stage, seconds: dict[str, float]) -> None:
        self._stage, self._seconds = stage, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    def _until(self, op: str, work: Callable[..., T], *given: Any) -> T:
        end = time.perf_counter() + self._seconds[op]
        done = work(*given)
        time.sleep(max(0.0, end - time.perf_counter()))
        return done

    def forward(self, *given: Any) -> Any:
        return self._until("F", self._stage.forward, *given)

    def backward(self, *given: Any) -> Any:
        return self._until("B", self._stage.backward, *given)

    def backward_input(self, *given: Any) -> Any:
        return self._until("I", self._stage.backward_input, *given)

    def backward_weight(self, *given: Any) -> Any:
        return self._until("W", self._stage.backward_weight, *given)


@dataclass(frozen=True)
class Row:
    """Seconds of a step of one schedule: as it ran, and as simulated from the sleeps and the time of a message."""

    name: str
    stages: int
    layers: Sequence[float]
    steps: list[float]
    """All that were measured."""
    measured: float
    """The shortest of them: a busy machine makes steps longer, and never shorter."""
    simulated: float
    bubble_measured: float
    """Of all ranks together: what the sleeps leave of the step, update and norm included."""
    bubble_simulated: float
    error: float
    """Of the simulated time."""


class Heard(Listener):
    """Milliseconds of every step."""

    def __init__(self) -> None:
        self.ms: list[float] = []

    def stepped(self, record: StepRecord) -> None:
        self.ms.append(record.ms_per_step or 0.0)


def resolved_for(name: str, p: int, m: int, layers: int, *more: str) -> Resolved:
    sizes = ["--pp", f"{p}", "--global-batch", f"{m}", "--layers", f"{layers}", "--hidden", "16", "--heads", "2"]
    steps = STEPS + (MEASURES - 1) * (name == "auto")
    words = [*sizes, "--seq-len", "16", "--micro-batch", "1", "--steps", f"{steps}", "--eval-every", "0"]
    data = str(Path(__file__).with_name("groups.py"))
    rest = ["--data", data, "--tokenizer", "byte", "--held-out", "0", "--no-save", "--schedule", name, *more]
    return parse([*words, *rest], world_size=p)


@contextmanager
def at_once(realtime: bool) -> Iterator[None]:
    """Within, the threads of this process that are there run as soon as they are ready, whoever else wants to."""
    threads = [int(each.name) for each in Path("/proc/self/task").iterdir()] if realtime else []
    for thread in threads:
        os.sched_setscheduler(thread, os.SCHED_RR, os.sched_param(1))
    try:
        yield
    finally:
        for thread in threads:
            with suppress(ProcessLookupError):
                os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


def stepped(world: World, resolved: Resolved, pieces: Pieces, *, realtime: bool = False) -> Row:
    """Train a few steps in which a layer, the embedding and the head take what `pieces` says."""
    resolved = placed(resolved, world)
    args = resolved.args
    layers = stage_counts(args)
    cost = pieces.cost(layers)
    text = Text.open(args)
    with ParallelState.build(resolved.layout, world, axes=axes_of(args, resolved.layout)) as state:
        built = build(args, state)
        executor = built.stepper.executor
        executor.stages = {s: Padded(stage, seconds(cost, s)) for s, stage in executor.stages.items()}  # type: ignore[misc]
        heard = Heard()
        with trainer_of(args, built, feed_of(args, text.mix), []) as trainer, at_once(realtime):
            trainer.fit(args.run.steps, [heard], stop=bool, metrics=False)
            hop = torch.tensor(hop_seconds(executor.link, 4 * args.model.hidden * args.batch.seq_len))
        dist.all_reduce(hop, dist.ReduceOp.MAX)
        order = computations(built.stepper.executor.program)
    timeline = simulate(order, replace(cost, hop=float(hop)))
    steps = [ms * 1e-3 for ms in heard.ms[1 - STEPS :]] or [float("nan")]  # only rank 0 is told
    best, simulated = min(steps), makespan(timeline)
    busy = float((timeline.end - timeline.start).sum()) / resolved.layout.size("pp")
    shares = 1 - busy / best, bubble(timeline), simulated / best - 1
    return Row(
        layout_line(args).partition("(cpu), ")[2].rpartition(", ")[0],
        len(layers),
        layers,
        steps,
        best,
        simulated,
        *shares,
    )


def seconds(cost: Cost, stage: int) -> dict[str, float]:
    """Of F, B, I and W of a stage."""
    return {op: cost.time(Action.parse(f"{stage}{op}0")) for op in "FBIW"}


def measure(
    names: list[str], p: int, m: int, layers: int, layer: float, head: float, out: Path | None, realtime: bool
) -> int:
    """All of these schedules, one after another; rank 0 prints a table, and writes the figures."""
    one = layer, layer, 0.7 * layer
    halves = 0.5, 0.5, 0.5  # where stages cut layers
    pieces = Pieces(one, head=(2.7 * head * layer, 0.0, 0.0), shares=halves)
    rows = []
    with initialize(device="cpu", threads=1) as world, tempfile.TemporaryDirectory() as directory:
        costs = ("--schedule-costs", f"{directory}/costs.json")
        asked: list[tuple[str, ...]] = [(name,) for name in names if name != "auto"]
        if "auto" in names:  # the first measures, and the others go by that
            asked += [("auto", *costs, "--vpp", "2"), ("auto", *costs), ("auto", *costs, "--partition", "searched")]
        for name, *more in asked:
            row = stepped(world, resolved_for(name, p, m, layers, *more), pieces, realtime=realtime)
            rows.append(row)
            if world.rank == 0:
                print(
                    f"{row.name:15} {row.measured:.3f} s, simulated {row.simulated:.3f} s ({row.error:+.1%})",
                    flush=True,
                )
        if world.rank == 0:
            load = os.getloadavg()[0]
            print(table(rows))
            if out is not None:
                about = {"pp": p, "microbatches": m, "layers": layers, "layer_forward_s": layer, "head_layers": head}
                machine = {"cores": os.cpu_count(), "load": load, "torch": torch.__version__, "realtime": realtime}
                out.parent.mkdir(parents=True, exist_ok=True)
                said = {"about": about | machine, "rows": [asdict(row) for row in rows]}
                out.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    return 0


def table(rows: list[Row]) -> str:
    lines = [
        "| schedule | stages | measured, s | simulated, s | error | bubble | simulated |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        shares = f"{r.error:+.1%} | {r.bubble_measured:.1%} | {r.bubble_simulated:.1%}"
        lines.append(f"| `{r.name}` | {r.stages} | {r.measured:.3f} | {r.simulated:.3f} | {shares} |")
    return "\n".join(lines)
