"""What a cut block is worth to D4 on two pipeline ranks: `python -m benchmarks.cut_blocks`.

Steps are simulated twice, with whole layers and with a cut block: by the estimate from the arguments alone, and by the
costs that two H200s measured of whole layers (`h200x2/D4-schedule-steps.json`), of which attention has the share that
the estimate gives it. Needs no GPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.train.peers.stretto_peer import words_of
from benchmarks.train.shapes import SHAPES, Job
from stretto.arguments import parse
from stretto.arguments.schema import Arguments
from stretto.estimate import rank_ledger, stage_counts
from stretto.estimate.chips import CHIPS
from stretto.estimate.step_time import step_time
from stretto.estimate.sublayer_time import sublayer_shares
from stretto.schedule import Cost, makespan, schedule_for, simulate
from stretto.schedule.blocks import counts_text
from stretto.schedule.pieces import Pieces

MEASURED = Path(__file__).parent / "results/h200x2/D4-schedule-steps.json"
SCHEDULES = (
    ("1f1b", 1, "1f1b"),
    ("zb-h1", 1, "zb-h1"),
    ("zb-h2", 1, "zb-h1"),
    ("interleaved", 2, "interleaved"),
    ("interleaved", 4, "interleaved"),
    ("interleaved-zb", 2, "interleaved-zb"),
    ("interleaved-zb", 4, "interleaved-zb"),
    ("zbv", 2, "zbv"),
)
"""Schedule, stages on a rank, and whose measured costs it takes."""


def arguments(*words: str) -> Arguments:
    """Of D4 on two pipeline ranks."""
    job = Job(SHAPES["D4"], "pp", nproc=2, device="cuda", dtype="bf16", compile=True, tokens=None)
    return parse([*words_of(job), *words], env={}, world_size=2, files=False).args


def measured() -> dict[str, tuple[Pieces, float]]:
    """By schedule what a layer and the ends took, and norm and update behind the last gradient."""
    found, shares = {}, sublayer_shares(arguments(), CHIPS["h200"])
    for row in json.loads(MEASURED.read_text())["rows"]:
        said: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row["cost"].items()}
        pieces = Pieces.of(Cost(**said), row["layers"], shares)
        found[row["name"]] = pieces, row["norm"] + max(row["update"])
    return found


def main() -> None:
    """Print the table."""
    taken = measured()
    print("| schedule | layers | estimated, ms | tokens/s | by measured costs, ms | tokens/s | GiB of the two ranks |")
    print("|---|---|---|---|---|---|---|")
    for name, v, like in SCHEDULES:
        words = "--schedule", name, "--vpp", f"{v}"
        pieces, behind = taken[like]
        cut = stage_counts(arguments(*words))
        for layers in ((8 / (2 * v),) * 2 * v, cut):
            args = arguments(*words, "--stage-layers", counts_text(layers))
            tokens = args.batch.global_batch * args.batch.seq_len
            estimated = step_time(args, CHIPS["h200"]).total
            simulated = behind + makespan(simulate(schedule_for(name, 2, 8, v), pieces.cost(layers)))
            peaks = ", ".join(f"{rank_ledger(args, rank).total / 2**30:.1f}" for rank in (0, 1))
            times = " | ".join(f"{1e3 * t:,.0f} | {tokens / t / 1e3:.1f}k" for t in (estimated, simulated))
            print(f"| `{name}` | {counts_text(layers)} | {times} | {peaks} |")


if __name__ == "__main__":
    main()
