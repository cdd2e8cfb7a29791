"""The ledger beside what was measured on H200s: `python -m benchmarks.memory` prints the tables of the docs.

Measured is what torch's allocator had in use at most, as each file says. Runs of code that is gone are not among them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stretto.arguments import parse
from stretto.estimate import Ledger, rank_ledger
from stretto.estimate.moments import stage_activations
from stretto.estimate.sizes import in_flight

RESULTS = Path(__file__).parent / "results"
RUNS = (
    ("h200/S4.json", "stretto-no-graphs"),
    ("h200/S16.json", "stretto"),
    ("h200x2/D1.json", "stretto"),
    ("h200x2/D1-block.json", "stretto-block"),
    ("h200x2/D2-breadth.json", "stretto"),
    ("h200x2/D2-breadth.json", "stretto-fp8"),
    ("h200x2/D2-fp8.json", "stretto-fp8-rowwise"),
    ("h200x2/D4-dp.json", "stretto"),
    ("h200x2/D4-zero1.json", "stretto-zero1"),
    ("h200x2/D4-dp-sharded.json", "stretto-fsdp"),
    ("h200x2/D4-fsdp-copy-engines.json", "stretto-fsdp"),
    ("h200x2/D4-fsdp-copy-engines.json", "stretto-fsdp-nccl"),
    ("h200x2/D4-fsdp-copy-engines.json", "stretto-fsdp-selective"),
    ("h200x2/D4-tp.json", "stretto"),
    ("h200x2/D4-tp-nccl.json", "stretto-nccl"),
    ("h200x2/D4-pp.json", "stretto"),
    ("h200x2/D4-schedules.json", "stretto-zbv"),
    ("h200x2/D4-schedules.json", "stretto-interleaved"),
)
"""Files of results, and a peer of each."""
STEPS = ("steps-olmoe", "steps-32k", "steps-32k-cp2", "steps-128k", "steps-128k-cp2")
"""Of `benchmarks.steps`."""


@dataclass(frozen=True)
class Row:
    """A rank at its fullest, in bytes."""

    file: str
    run: str
    measured: float
    said: Ledger

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.said.total / self.measured - 1


def rows() -> Iterator[Row]:
    """Every run, and each rank of a pipeline."""
    for file, peer in RUNS:
        entry: dict[str, Any] = json.loads((RESULTS / file).read_text())["peers"][peer]
        words = [str(word) for word in entry["about"]["words"]]
        yield from _ranks(file, peer, words, entry["peak_bytes"])
    for name in STEPS:
        file = f"h200x2/{name}.json"
        for case, entry in json.loads((RESULTS / file).read_text())["cases"].items():
            yield from _ranks(file, case, entry["words"].split(), [entry["last"]["peak_gib"] * 2**30])


def _as_then(words: list[str]) -> list[str]:
    """Runs whose words do not say it are older than the default of today."""
    return words if "--sharding" in words else [*words, "--sharding", "none"]


def _ranks(file: str, run: str, words: list[str], peaks: list[float]) -> Iterator[Row]:
    args = parse(_as_then(words), files=False).args
    if args.parallel.pp == 1:
        yield Row(file, run, max(peaks), rank_ledger(args, 0))
        return
    for rank, peak in enumerate(peaks):
        yield Row(file, f"{run}, rank {rank}", peak, rank_ledger(args, rank))


@dataclass(frozen=True)
class Category:
    """What a rank holds of one kind, in bytes: at the end of a forward, before anything is let go of."""

    file: str
    run: str
    name: str
    measured: float
    said: float

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.said / self.measured - 1


def categories() -> Iterator[Category]:
    """Of each run without a pipeline whose file tells them."""
    for file, peer in RUNS:
        entry: dict[str, Any] = json.loads((RESULTS / file).read_text())["peers"][peer]
        args = parse(_as_then([str(word) for word in entry["about"]["words"]]), files=False).args
        if "memory_bytes" not in entry or args.parallel.pp > 1:
            continue
        found = rank_ledger(args, 0)
        said = {
            "weights": found.weights,
            "gradients": found.gradients,
            "optimizer": found.masters + found.optimizer,
            "weights in 8 bits": found.quantized,
            "saved activations": stage_activations(args, 0).kept * in_flight(args, 0),
        }
        for name, size in said.items():
            if measured := entry["memory_bytes"][0].get(name):
                yield Category(file, peer, name, measured, size)


if __name__ == "__main__":
    print("| run | peer | measured, GiB | ledger, GiB | | at most in the |\n|---|---|---|---|---|---|")
    for row in rows():
        cells = (row.file, f"`{row.run}`", f"{row.measured / 2**30:.2f}", f"{row.said.total / 2**30:.2f}")
        print(f"| {' | '.join(cells)} | {row.error:+.1%} | {row.said.moment} |")
    print("\n| run | peer | | measured, GiB | ledger, GiB | |\n|---|---|---|---|---|---|")
    for each in categories():
        cells = (each.file, f"`{each.run}`", each.name, f"{each.measured / 2**30:.3f}", f"{each.said / 2**30:.3f}")
        print(f"| {' | '.join(cells)} | {each.error:+.2%} |")
