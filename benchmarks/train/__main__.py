"""The command line; see docs/performance.md."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.train.conductor import Plan, start
from benchmarks.train.data import write_tokens
from benchmarks.train.peers import PEERS
from benchmarks.train.report import show
from benchmarks.train.shapes import PARALLEL, SHAPES, Job


def main(argv: Sequence[str]) -> int:
    """0 when every peer that was asked for was measured, else 1."""
    options = _options(argv)
    began = time.monotonic()
    out = options.out or Path(f"benchmarks/results/train-{options.shape}-{options.parallel}.json")

    def say(line: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {line}", flush=True)

    with tempfile.TemporaryDirectory() as directory:
        tokens = Path(directory) / "tokens"
        write_tokens(tokens, SHAPES[options.shape])
        plan = _plan(options, tokens)
        found = start(plan, out, shlex.join(["python", "-m", "benchmarks.train", *argv]), say)
    show(found, Console(width=options.width))
    say(f"saved {out}")
    return 0 if all("gone" not in peer for peer in found["peers"].values()) else 1


def _plan(options: argparse.Namespace, tokens: Path) -> Plan:
    job = Job(
        shape=SHAPES[options.shape],
        parallel=options.parallel,
        nproc=1 if options.parallel == "one" else options.nproc,
        device=options.device,
        dtype=options.dtype,
        compile=options.device == "cuda" and not options.eager,
        tokens=str(tokens),
    )
    job.shape.microbatches(job.size("dp"))  # raises where the batch does not divide
    if options.traces:
        options.traces.mkdir(parents=True, exist_ok=True)
    return Plan(
        job,
        tuple(options.peers.split(",")),
        {"stretto": options.stretto, "torchtitan": options.torchtitan},
        steps=options.steps,
        turns=options.turns,
        warmup=options.warmup,
        ceiling_seconds=options.ceiling_seconds,
        waterfall=not options.no_waterfall,
        memory=not options.no_memory,
        traces=options.traces,
        limit=options.limit,
    )


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train")
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="D1", help="; ".join(f"{s.name}: {s.about}" for s in SHAPES.values()))
    add("--parallel", choices=PARALLEL, default="one", help="how the devices are used; tp is with sequence parallelism")
    add("--nproc", type=int, default=2, help="devices, where they are more than one")
    add("--peers", default="stretto,torch", help=f"separated by commas: {', '.join(PEERS)}")
    add("--stretto", default="", metavar="WORDS", help='more settings of stretto train, as in "--recompute block"')
    add("--torchtitan", default="", metavar="WORDS", help="more settings of torchtitan")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the weights in the forward")
    add("--eager", action="store_true", help="do not compile the peers (Stretto has settings of its own)")
    add("--steps", type=int, default=20, help="measured steps of each peer")
    add("--turns", type=int, default=2, help="each peer's steps are cut into so many turns")
    add("--warmup", type=int, default=10, help="steps before the first turn")
    add("--ceiling-seconds", type=float, default=0.5, help="for each rate of the ceiling; 0: none")
    add("--no-waterfall", action="store_true")
    add("--no-memory", action="store_true")
    add("--traces", type=Path, metavar="DIR", help="keep the traces there")
    add("--limit", type=float, default=240.0, help="seconds for one answer of a peer")
    add("--width", type=int, default=140, help="of the tables")
    add("--out", type=Path, metavar="FILE.json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
