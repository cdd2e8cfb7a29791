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

RESULTS = Path(__file__).parent / "results" / "h200x2"
EARLIER = (
    "D4-dp-traced",
    "D4-pp-traced",
    "D4-fsdp",
    "steps-olmoe-first",
    "steps-olmoe-ep2-first",
    "steps-olmoe-ep2-before",
    "steps-olmoe-ep2-rows",
    "steps-olmoe-ep2-ordered",
    "steps-olmoe-ep2-parts",
    "steps-olmoe-ep2-unread",
    "steps-olmoe-ep2",
    "steps-512k",
    "steps-32k",
    "steps-32k-squares",
    "steps-128k",
    "steps-128k-cp2",
    "steps-128k-packed-1",
    "steps-cp2-zero1",
    "steps-cp2-packed",
)
"""Files of code that is gone: since 512k a block's input, 4 GiB there, comes back from the host while the block behind
it is at work; since those of 32k and 128k a block is two nodes of autograd, and keeps an activation less."""
BLOCKS = (
    "D4-dp-sharded",
    "D4-fsdp-before",
    "D4-fsdp-copy-engines",
    "D4-fsdp-fp8",
    "D4-fsdp-fused-sum",
    "D4-fsdp-lean",
)
"""Files in which gradients of `fsdp` fill by blocks: `D4-fsdp-turns` has later ones. What stays through a step does."""
GONE = (("D2", "stretto-light"),)
"""A peer whose words are none any more."""
WHOLE = {"D4-pp": "4,4", "D4-schedules": "2,2,2,2"}
"""Layers of the stages of runs that are older than cut blocks."""
RING = ("steps-32k-cp2", "steps-cp2-squares")
"""Runs over cp whose `auto` took a ring."""
CLOSE = 0.005
"""An error that is told as none."""


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
    """Every run of a whole step, and each rank of a pipeline."""
    for file, peer, entry in _peers():
        if "fsdp" in peer and file in BLOCKS:
            continue
        yield from _ranks(file, peer, _words(entry), entry["peak_bytes"])
    for path in _files("steps-*.json"):
        for case, entry in json.loads(path.read_text())["cases"].items():
            if "last" in entry:
                yield from _ranks(path.stem, case, entry["words"].split(), [entry["last"]["peak_gib"] * 2**30])


def _peers() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """File, peer and result of Stretto's runs beside others."""
    for path in _files("[DS]*.json"):
        peers: dict[str, dict[str, Any]] = json.loads(path.read_text()).get("peers", {})
        for peer, entry in peers.items():
            if peer.startswith("stretto") and "peak_bytes" in entry and (path.stem, peer) not in GONE:
                yield path.stem, peer, entry


def _files(names: str) -> list[Path]:
    return sorted(path for path in RESULTS.glob(names) if path.stem not in EARLIER)


def _words(entry: dict[str, Any]) -> list[str]:
    return [str(word) for word in entry["about"]["words"]]


def _as_then(file: str, words: list[str]) -> list[str]:
    """Runs whose words do not say it are older than the defaults of today."""
    sharding = [] if "--sharding" in words else ["--sharding", "none"]
    ring = ["--cp-comm", "ring"] if file in RING else []
    return [*words, *sharding, *ring, *(["--stage-layers", WHOLE[file]] if file in WHOLE else [])]


def _ranks(file: str, run: str, words: list[str], peaks: list[float]) -> Iterator[Row]:
    args = parse(_as_then(file, words), files=False).args
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
    for file, peer, entry in _peers():
        args = parse(_as_then(file, _words(entry)), files=False).args
        # Masters with a remainder are made whole as they are counted.
        if "memory_bytes" not in entry or args.parallel.pp > 1 or args.optimizer.masters == "remainder":
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


def summary() -> str:
    """What the documents say of all peaks."""
    errors = [abs(row.error) for row in rows()]
    close = sum(error <= CLOSE for error in errors)
    return f"within {100 * CLOSE:g} % of the measured one in {close} of {len(errors)} cases"


if __name__ == "__main__":
    print("| run | peer | measured, GiB | ledger, GiB | | at most in the |\n|---|---|---|---|---|---|")
    for row in rows():
        cells = (row.file, f"`{row.run}`", f"{row.measured / 2**30:.2f}", f"{row.said.total / 2**30:.2f}")
        print(f"| {' | '.join(cells)} | {row.error:+.1%} | {row.said.moment} |")
    print(f"\n{summary()}")
    print("\n| run | peer | | measured, GiB | ledger, GiB | |\n|---|---|---|---|---|---|")
    for each in categories():
        cells = (each.file, f"`{each.run}`", each.name, f"{each.measured / 2**30:.3f}", f"{each.said / 2**30:.3f}")
        print(f"| {' | '.join(cells)} | {each.error:+.2%} |")
