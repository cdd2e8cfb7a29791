"""Activations that a rank holds at most under each schedule: counted in storages that live, beside what is predicted.

    python -m benchmarks.schedule_memory --pp 4 --microbatches 8

The real model, on the CPU over Gloo. After each computation of a rank the bytes of all storages that the step has made
and that are still there are counted. Predicted: the activations that are held at once by the order alone, each of the
bytes that a forward of its stage keeps by `stretto.estimate`. Beyond those there are what has just come or is still to
be sent, and the gradients on their way through a block. What a W needs, inputs and output gradients of all GEMMs, is
about as much as a forward keeps: an activation does not become smaller with its I.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stretto.arguments.elsewhere import validated_in
from stretto.arguments.schema import Arguments, BatchConfig, ModelConfig, ParallelConfig
from stretto.estimate import stage_blocks
from stretto.estimate.kept import NOTHING, kept
from stretto.estimate.sizes import entering_bytes
from stretto.exchange import all_gather_json
from stretto.initialize import initialize
from stretto.launch.local import run_local
from stretto.layout import Layout
from stretto.pipeline_parallel.stage import Stage
from stretto.schedule import GENERATORS, Op, Schedule
from stretto.schedule.blocks import StageBlock
from stretto.schedule.measured import computations
from stretto.testing.live_storage import LiveStorage
from stretto.verify import build, random_batch
from stretto.world import World


@dataclass(frozen=True)
class Row:
    """Of each rank: microbatches of all of its layers, whole or in parts, that it holds at most."""

    name: str
    predicted: list[float]
    measured: list[float]


class Watched:
    """A stage after whose computations bytes are counted."""

    def __init__(self, stage: Stage, count: Callable[[], object]) -> None:
        self._stage, self._count = stage, count

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._stage, name)
        if name not in ("forward", "backward", "backward_input", "backward_weight"):
            return found

        def counted(*given: Any) -> Any:
            done = found(*given)
            self._count()
            return done

        return counted


def arguments(name: str, p: int, m: int, layers: int) -> tuple[Arguments, Layout]:
    made = GENERATORS[name]
    layout = Layout.of(pp=p, vpp=made.stages, shape=made.shape if made.stages > 1 else "loop")
    args = Arguments(
        model=ModelConfig(layers=layers, hidden=64, heads=4, vocab=8),
        batch=BatchConfig(seq_len=64, micro_batch=1, global_batch=m),
        parallel=ParallelConfig(pp=p, dp=1, schedule=name, vpp=made.stages),  # type: ignore[arg-type]
    )
    return validated_in(args, layout).args, layout


def held(order: Schedule, rank: int, sizes: list[int]) -> int:
    """Bytes of the activations that the rank holds at most, by its order alone."""
    now = most = 0
    for action in order.ranks[rank]:
        now += sizes[action.stage] * {Op.F: 1, Op.B: -1, Op.W: -1}.get(action.op, 0)
        most = max(most, now)
    return most


def peaks(world: World, name: str, p: int, m: int, layers: int) -> Row:
    """A step of the real model, the second: the first makes what stays."""
    args, layout = arguments(name, p, m, layers)
    entering = entering_bytes(args)
    sizes = [entering + sum(kept(args, block, NOTHING).total for block in held) for held in stage_blocks(args)]
    whole = kept(args, StageBlock(0), NOTHING).total * layers // p
    with build(args, layout, world) as session:
        executor, axis = session.built.stepper.executor, session.state.axis("pp")
        session.step(random_batch(args, 1))
        counts: list[int] = []
        with LiveStorage() as live:
            executor.stages = {
                s: Watched(stage, lambda: counts.append(live.nbytes)) for s, stage in executor.stages.items()
            }  # type: ignore[misc]
            session.step(random_batch(args, 2))
        order = computations(executor.program)
        told = all_gather_json([held(order, axis.rank, sizes) / whole, max(counts) / whole], axis)
    return Row(name, [round(a, 3) for a, _ in told], [round(b, 3) for _, b in told])


def measure(names: list[str], p: int, m: int, layers: int, out: Path | None) -> int:
    rows = []
    with initialize(device="cpu", threads=1) as world:
        rows.extend(peaks(world, name, p, m, layers) for name in names)
        if world.rank == 0:
            print("| schedule | predicted | measured |", "|---|---|---|", sep="\n")
            for r in rows:
                both = (" ".join(f"{x:.2f}" for x in each) for each in (r.predicted, r.measured))
                print(f"| `{r.name}` | {' | '.join(both)} |")
            if out is not None:
                out.parent.mkdir(parents=True, exist_ok=True)
                said = {"pp": p, "microbatches": m, "layers": layers, "rows": [asdict(r) for r in rows]}
                out.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pp", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--schedules", nargs="*")
    parser.add_argument("--out", type=Path)
    said = parser.parse_args()
    names = said.schedules or sorted(GENERATORS)
    return run_local(said.pp, partial(measure, names, said.pp, said.microbatches, said.layers, said.out))


if __name__ == "__main__":
    raise SystemExit(main())
