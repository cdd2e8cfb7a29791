"""The spine on GPUs: every way to use two of them gives what one gives, and trains.

    python -m benchmarks.spine [--out FILE.json] [--device cuda] [--nproc 2] [--steps 60] [--small]

For tp, pp and dp over the given ranks in turn: gradients, losses and updates against one process in fp64, fp32 and
bf16; then a training run on the standard library's sources, whose losses are held against those of one rank.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from stretto.arguments.schema import (
    Arguments,
    BatchConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
)
from stretto.data.feed import Feed
from stretto.data.text import Text
from stretto.initialize import initialize
from stretto.launch.local import run_local
from stretto.layout import Layout
from stretto.models import Microbatch
from stretto.parallel_state import ParallelState
from stretto.train.build import build
from stretto.train.learning_rate import learning_rate
from stretto.train.text import valid_tokens
from stretto.verify import against_reference
from stretto.world import World

KINDS = ("loss", "gradient norm", "gradient", "update")


def ways(n: int) -> list[tuple[str, ParallelConfig]]:
    """Each parallelism over n ranks."""
    return [
        (f"tp={n}", ParallelConfig(tp=n, dp=1)),
        (f"tp={n}, sequence parallel", ParallelConfig(tp=n, dp=1, sequence_parallel=True)),
        (f"pp={n}, 1f1b", ParallelConfig(pp=n, dp=1)),
        (f"pp={n}, gpipe", ParallelConfig(pp=n, dp=1, schedule="gpipe")),
        (f"dp={n}", ParallelConfig(dp=n)),
    ]


def say(world: World, line: str) -> None:
    """Progress, from the first rank."""
    if world.rank == 0:
        print(line, flush=True)


def layout_of(p: ParallelConfig) -> Layout:
    return Layout.of(tp=p.tp, pp=p.pp, dp=p.dp or 1)


def proofs(world: World, small: bool) -> list[dict[str, Any]]:
    """Compare every way with one process in every dtype."""
    model = ModelConfig(layers=3, hidden=64 if small else 256, heads=8, kv_heads=4, vocab=1003, tied=True, qk_norm=True)
    batch = BatchConfig(seq_len=32 if small else 256, micro_batch=2, global_batch=16)
    rows = []
    dtypes: tuple[Literal["fp64", "fp32", "bf16"], ...] = ("fp64", "fp32", "bf16")
    for name, parallel in ways(world.size):
        for dtype in dtypes:
            run = RunConfig(dtype=dtype, device="cpu" if world.device.type == "cpu" else "cuda")
            args = Arguments(model=model, parallel=parallel, batch=batch, run=run)
            begin = time.perf_counter()
            found = against_reference(args, layout_of(parallel), world)
            worst = {
                kind: max(
                    ((d.error, d.limit) for d in found.differences if d.name.split(" ", 2)[2].startswith(kind)),
                    key=lambda pair: pair[0] / pair[1],
                )
                for kind in KINDS
            }
            say(
                world, f"{name} {dtype}: {'equal' if found.equal else 'DIFFERENT'}, {time.perf_counter() - begin:.1f} s"
            )
            rows.append(
                {
                    "way": name,
                    "dtype": dtype,
                    "equal": found.equal,
                    "worst": worst,
                    "failures": [asdict(d) for d in found.failures[:5]],
                    "seconds": time.perf_counter() - begin,
                }
            )
    return rows


def training(world: World, text: Text, steps: int, small: bool) -> list[dict[str, Any]]:
    """Train every way in bf16 with fp32 masters from the same seed; one rank of its own first."""
    model = ModelConfig(layers=4 if small else 16, hidden=64 if small else 1024, heads=8, kv_heads=4, vocab=257)
    batch = BatchConfig(seq_len=64 if small else 1024, micro_batch=4, global_batch=32)
    optimizer = OptimizerConfig(lr=1e-3, warmup_steps=10, decay_steps=steps)
    device: Literal["cpu", "cuda"] = "cpu" if world.device.type == "cpu" else "cuda"
    run = RunConfig(dtype="bf16", device=device)
    args = Arguments(model=model, batch=batch, optimizer=optimizer, run=run)
    rows = []
    alone = World.single(world.device)
    for name, parallel in [("one rank", ParallelConfig(dp=1)), *ways(world.size)]:
        here = alone if name == "one rank" else world
        losses, seconds, peak = train(replace(args, parallel=parallel), here, text, steps)
        say(world, f"{name}: loss {losses[0]:.4f} -> {losses[-1]:.4f}, {seconds * 1e3:.1f} ms a step")
        rows.append(
            {
                "way": name,
                "first": losses[0],
                "last": losses[-1],
                "furthest_from_one_rank": max(abs(a - b) for a, b in zip(losses, rows[0]["losses"], strict=True))
                if rows
                else 0.0,
                "losses": losses,
                "tokens_per_second": batch.global_batch * batch.seq_len / seconds,
                "peak_gib": peak,
            }
        )
    return rows


def train(args: Arguments, world: World, text: Text, steps: int) -> tuple[list[float], float, float]:
    """Losses of each step, median seconds of a step, peak GiB on this device."""
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with ParallelState.build(layout_of(args.parallel), world) as state:
        built = build(args, state)
        feed = Feed(text.mix, seq_len=args.batch.seq_len, seed=args.run.seed)
        losses, times = [], []
        for step in range(steps):
            begin = time.perf_counter()
            dp = state.axis("dp")
            rows = feed.batch(args.batch.global_batch, dp.rank, dp.size, args.batch.micro_batch)
            batches = [b.to(world.device) for b in rows]
            count = valid_tokens(batches, state)
            result = built.stepper.step(
                [Microbatch(b, count) for b in batches], learning_rate(args.optimizer)(step + 1)
            )
            losses.append(result.loss.item())
            times.append(time.perf_counter() - begin)
        built.weights.close()
    peak = torch.cuda.max_memory_allocated() / 2**30 if world.device.type == "cuda" else 0.0
    return losses, sorted(times)[len(times) // 2], peak


def work(options: argparse.Namespace, text: Text) -> int:
    """What each rank does."""
    with initialize(device=options.device, timeout=120) as world:
        name = torch.cuda.get_device_name() if world.device.type == "cuda" else platform.processor() or "cpu"
        found = {
            "device": f"{world.size} x {name}",
            "versions": {"torch": torch.__version__, "python": platform.python_version(), "cuda": torch.version.cuda},
            "command": shlex.join(["python", "-m", "benchmarks.spine", *sys.argv[1:]]),
            "proofs": proofs(world, options.small),
            "training": training(world, text, options.steps, options.small),
        }
    if world.rank == 0:
        show(found)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(row["equal"] for row in found["proofs"]) else 1


def show(found: dict[str, Any]) -> None:
    """The short tables."""
    console = Console(width=120)
    table = Table("way", "dtype", *KINDS, "equal", title=f"against one process, {found['device']}")
    for row in found["proofs"]:
        worst = [f"{row['worst'][k][0]:.1e} of {row['worst'][k][1]:.0e}" for k in KINDS]
        table.add_row(row["way"], row["dtype"], *worst, "yes" if row["equal"] else "NO")
    console.print(table)
    for row in found["proofs"]:
        if row["failures"]:
            console.print(row["way"], row["dtype"], row["failures"])
    table = Table(
        "way", "first loss", "last loss", "furthest from one rank", "tokens/s", "peak GiB", title="training, bf16"
    )
    for row in found["training"]:
        table.add_row(
            row["way"],
            f"{row['first']:.4f}",
            f"{row['last']:.4f}",
            f"{row['furthest_from_one_rank']:.4f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['peak_gib']:.1f}",
        )
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/spine.json"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--small", action="store_true", help="sizes for a laptop")
    options = parser.parse_args()
    return run_local(options.nproc, partial(work, options, Text.open(Arguments())))


if __name__ == "__main__":
    sys.exit(main())
