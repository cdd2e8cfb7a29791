"""What `--exact` costs: seconds of a step with and without, for each tp, and whether the weights are the same bits.

    python -m benchmarks.exact [--shape demo|D2] [--tp 1,2] [--slices 8] [--modes usual,eager,exact] [--out FILE]

`usual` is what a run does unless told otherwise, `eager` the same without torch.compile, `exact` in so many slices;
none with CUDA graphs. Weights are equal where the checksums of all masters after the same steps are.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stretto.arguments import Resolved, parse
from stretto.initialize import initialize
from stretto.launch.local import run_local
from stretto.verify import Session, build, random_batch
from stretto.world import World

SHAPES = {
    "demo": "--preset demo --no-tied --heads 8 --kv-heads 4 --hidden 128 --pp 1 --dp 1",
    "D2": "--hidden 4096 --heads 32 --kv-heads 8 --ffn 14336 --layers 4 --vocab 32768 --seq-len 4096 "
    "--micro-batch 1 --global-batch 2 --no-tied --norm rms --activation swiglu --dtype bf16 --pp 1 --dp 1",
}
MODES = {"usual": "", "eager": "--no-compile", "exact": "--exact {slices}"}


@dataclass(frozen=True)
class Measured:
    """One line of the table."""

    mode: str
    tp: int
    step_ms: float
    cpu_ms: float
    """Of all threads of the first rank: on a busy machine this tells, and `step_ms` does not."""
    loss: float
    weights: str
    """Checksum of all masters."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exact", description="what --exact costs")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="demo")
    parser.add_argument("--tp", default="1,2")
    parser.add_argument("--slices", type=int, default=2)
    parser.add_argument("--modes", default="usual,eager,exact")
    parser.add_argument("--words", default="", help="more settings of stretto train")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed, after two that are not")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    device = asked.device if asked.device != "auto" else "cuda" if torch.cuda.device_count() else "cpu"
    found: dict[str, Any] = {"command": shlex.join(["python -m benchmarks.exact", *sys.argv[1:]]), "device": device}
    lines: list[Measured] = []
    for tp in map(int, asked.tp.split(",")):
        for mode in asked.modes.split(","):
            sequence = "--sequence-parallel" if tp > 1 else ""
            words = f"{SHAPES[asked.shape]} --device {device} --tp {tp} --nproc {tp} {sequence} "
            words += MODES[mode].format(slices=asked.slices) + f" {asked.words}"
            with tempfile.TemporaryDirectory() as directory:
                at = Path(directory, "line.json")
                resolved = parse(words.split(), env={}, files=False, world_size=tp)
                if run_local(tp, partial(measure, resolved, mode, asked.steps, at)):
                    raise SystemExit(f"{mode} at tp={tp} failed")
                lines.append(Measured(**json.loads(at.read_text())))
            last = lines[-1]
            spent = f"{last.step_ms:8.1f} ms ({last.cpu_ms:.1f} of CPU)"
            print(f"{mode:6} tp={tp}: {spent}, loss {last.loss!r}, weights {last.weights}", flush=True)
    found["lines"] = [asdict(line) for line in lines]
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


def measure(resolved: Resolved, mode: str, steps: int, into: Path) -> int:
    """One rank of a run; the first writes what was measured."""
    args = resolved.args
    with (
        initialize(device=args.run.device, threads=args.threads, deterministic=args.deterministic) as world,
        build(args, resolved.layout, world) as session,
    ):
        batches = [session.microbatches(random_batch(args, n)) for n in range(2 + steps)]
        times, work = [], []
        for batch in batches:
            _settle(world)
            began, busy = time.perf_counter(), time.process_time()
            result = session.built.stepper.step(batch, args.optimizer.lr)
            _settle(world)
            times.append(time.perf_counter() - began)
            work.append(time.process_time() - busy)
        weights = sum(session.from_all(_checksum(session))) % 2**64
        if world.rank == 0:
            ms, cpu = (1e3 * statistics.median(seconds[2:]) for seconds in (times, work))
            line = Measured(mode, args.parallel.tp, ms, cpu, result.loss.item(), f"{weights:016x}")
            into.write_text(json.dumps(asdict(line)))
    return 0


def _checksum(session: Session) -> int:
    """Of the bits of this rank's masters: the sum of their squares, in whatever order and wherever they lie."""
    total = 0
    for piece in session.built.optimizer.slices():
        if piece.owner and piece.name.startswith("model/"):
            bits = (piece.tensor.float() + 0.0).contiguous().view(torch.int32).to(torch.int64)
            total += int((bits * bits).sum())
    return total


def _settle(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
