"""Steps as `stretto.estimate` says them, beside steps that were measured: `python -m benchmarks.estimates`.

Reads the results that are committed; needs no GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stretto.arguments import parse
from stretto.estimate.chips import CHIPS
from stretto.estimate.passes import StepTime
from stretto.estimate.step_time import step_time

RESULTS = Path(__file__).parent / "results"
RUNS = (
    ("h200/D1.json", "stretto", ""),
    ("h200/D1-block.json", "stretto-block", ""),
    ("h200/D2-alone.json", "stretto", ""),
    ("h200/D2-fp8.json", "stretto-fp8", "--fp8 tensorwise"),
    ("h200/D3.json", "stretto", ""),
    ("h200/S16.json", "stretto", ""),
    ("h200x2/S4-newest.json", "stretto", ""),
    ("h200x2/S4-newest.json", "stretto-no-graphs", "--no-cuda-graphs"),
    ("h200x2/D4-dp.json", "stretto", ""),
    ("h200x2/D4-zero1.json", "stretto-zero1", "--sharding zero1"),
    ("h200x2/D4-fsdp-fused-sum.json", "stretto-fsdp", "--sharding fsdp"),
    ("h200x2/D4-tp.json", "stretto", ""),
    ("h200x2/D4-tp-nccl.json", "stretto-nccl", "--no-tp-comm-overlap"),
    ("h200x2/D4-pp.json", "stretto", "--stage-layers 4,4"),
    ("h200x2/D4-schedules.json", "stretto-zbv", "--stage-layers 2,2,2,2"),
    ("h200x2/D4-schedules.json", "stretto-interleaved", "--stage-layers 2,2,2,2"),
    ("h200x2/D4-halves.json", "stretto-halves-zb-h2", ""),
    ("h200x2/D4-halves.json", "stretto-halves-interleaved", ""),
    ("h200x2/D4-halves.json", "stretto-halves-interleaved4", ""),
    ("h200x2/D4-halves.json", "stretto-whole-interleaved4", ""),
    ("h200x2/D4-halves-copy-engines.json", "stretto-halves-interleaved4", ""),
    ("h200x2/D4-halves-copy-engines.json", "stretto-halves-auto-v", ""),
)
"""Files of results, a peer of each, and what it added to the words in the file, or what has another default since."""


@dataclass(frozen=True)
class Row:
    """A step on H200s, in milliseconds."""

    file: str
    peer: str
    measured: float
    estimated: StepTime

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return 1e3 * self.estimated.total / self.measured - 1


def rows() -> Iterator[Row]:
    """Every run."""
    for file, peer, more in RUNS:
        said: dict[str, Any] = json.loads((RESULTS / file).read_text())["peers"][peer]
        words = [str(word) for word in said["about"]["words"]]
        words += [] if not more or more.split()[0] in words else more.split()
        yield Row(file, peer, said["ms"]["median"], step_time(parse(words, files=False).args, CHIPS["h200"]))


if __name__ == "__main__":
    print("| run | peer | measured, ms | estimated, ms | | of which |\n|---|---|---|---|---|---|")
    for row in rows():
        cells = (
            row.file,
            f"`{row.peer}`",
            f"{row.measured:,.0f}",
            f"{1e3 * row.estimated.total:,.0f}",
            f"{row.error:+.1%}",
        )
        print(f"| {' | '.join(cells)} | {row.estimated.said} |")
