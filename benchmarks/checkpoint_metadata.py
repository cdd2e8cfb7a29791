"""What metadata costs at many ranks: planning, commit and load of a checkpoint in which no numbers are written.

    python -m benchmarks.checkpoint_metadata [--ranks 125,250,500,1000] [--layers 80]

A model of the shape of Llama-3-70B, masters and two moments; each block is flat storage, cut over all ranks, as
`--sharding fsdp` has it. Every rank's part is written as the library would, with files of holes in place of numbers.
It is loaded by ranks of another number. Seconds are those of the processor, so that others on the machine count little.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from stretto.checkpoint.commit import commit
from stretto.checkpoint.directory import prepare, step_path
from stretto.checkpoint.index import Index, blocks
from stretto.checkpoint.marker import INDEX, MARKER, METADATA, read_marker
from stretto.checkpoint.part import data_name, part_name
from stretto.checkpoint.planner import described, reads, wanted
from stretto.layout.flat import Flat, overlap, rectangles
from stretto.params import Slice

HIDDEN, FFN, VOCAB = 8192, 28672, 128256
KINDS = ("model", "exp_avg", "exp_avg_sq")
SUM = "0123456789abcdef"


def units(layers: int) -> list[dict[str, tuple[int, ...]]]:
    """The tensors of each piece of flat storage."""
    block = {"q": (HIDDEN, HIDDEN), "k": (1024, HIDDEN), "v": (1024, HIDDEN), "o": (HIDDEN, HIDDEN)}
    block |= {"gate": (FFN, HIDDEN), "up": (FFN, HIDDEN), "down": (HIDDEN, FFN), "norm1": (HIDDEN,), "norm2": (HIDDEN,)}
    found: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (VOCAB, HIDDEN)}]
    found += [{f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()} for i in range(layers)]
    return [*found, {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}]


def slices_of(layers: int, ranks: int) -> Callable[[int], list[Slice]]:
    """What a rank holds, without numbers."""
    storage = [(unit, Flat(tuple(math.prod(shape) for shape in unit.values()), ranks)) for unit in units(layers)]

    def of(rank: int) -> list[Slice]:
        found = []
        for unit, flat in storage:
            shard = flat.shard(rank)
            for (name, shape), span in zip(unit.items(), flat.spans, strict=True):
                inside = overlap(shard, span)
                for each in rectangles(shape, range(inside.start - span.start, inside.stop - span.start)):
                    x = torch.empty(each.shape, device="meta")
                    found += [Slice(f"{kind}/{name}", x, shape, each.offsets, True) for kind in KINDS]
        return found

    return of


def measured(layers: int, ranks: int, scratch: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        path = step_path(Path(name), 1)
        prepare(path)
        of, plans, sizes, pieces = slices_of(layers, ranks), [], [], 0
        for rank in range(ranks):
            held = of(rank)
            began = time.process_time()
            mine, _ = described(held)
            at, written = 0, []
            for p in mine.pieces:
                sums = [SUM for _ in blocks(p.sizes, p.itemsize)]
                written.append([p.name, p.dtype, p.shape, p.offsets, p.sizes, at, p.nbytes, at, sums])
                at += p.nbytes
            said = json.dumps({"pieces": written, "copies": mine.copies}, separators=(",", ":"))
            plans.append(time.process_time() - began)
            (path / part_name(rank, "0")).write_text(said)
            with (path / data_name(rank, "0")).open("wb") as stream:
                stream.truncate(at)
            sizes.append(len(said))
            pieces += len(written)
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        commit(path, 1, ranks, "0", b"{}")
        committed = time.process_time() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        marker, other = read_marker(path), slices_of(layers, ranks * 3 // 4)
        loads, near = [], []
        for rank in (0, ranks * 3 // 8, ranks * 3 // 4 - 1):
            held = other(rank)
            began = time.process_time()
            index = Index(path, read_marker(path))
            wanted(index, held)
            near.append(sum(1 for _ in reads(index, held)))
            loads.append(time.process_time() - began)
        files = {"index": marker.sizes[INDEX], "table": marker.sizes[INDEX] - marker.table}
        return {
            "ranks": ranks,
            "pieces": pieces,
            "save_plan_s": statistics.median(plans),
            "save_part_bytes": max(sizes),
            "commit_s": committed,
            "commit_us_a_piece": 1e6 * committed / pieces,
            "commit_MiB": (peak - before) / 2**10,
            "index_bytes": files["index"],
            "table_bytes": files["table"],
            "marker_bytes": (path / MARKER).stat().st_size,
            "dcp_metadata_bytes": marker.sizes[METADATA],
            "load_plan_s": statistics.median(loads),
            "load_reads": max(near),
        }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint_metadata", description="metadata alone")
    parser.add_argument("--ranks", default="125,250,500,1000", help="numbers of ranks that save")
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measured(asked.layers, int(asked.ranks), asked.scratch)))
        return
    rows = []
    for ranks in asked.ranks.split(","):  # a process each: the peak of one must not hide that of the next
        words = [sys.executable, "-m", "benchmarks.checkpoint_metadata", "--one", "--ranks", ranks]
        words += ["--layers", f"{asked.layers}", *(["--scratch", f"{asked.scratch}"] if asked.scratch else [])]
        rows.append(json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True).stdout))
    table = Table("", *(f"{row['ranks']:,} ranks" for row in rows), title=f"{asked.layers} layers")
    for name in list(rows[0])[1:]:
        table.add_row(
            name, *(f"{row[name]:,.4g}" if isinstance(row[name], float) else f"{row[name]:,}" for row in rows)
        )
    Console().print(table)
    if asked.results:
        command = f"python -m benchmarks.checkpoint_metadata --ranks {asked.ranks} --layers {asked.layers}"
        asked.results.write_text(
            json.dumps({"command": command, "cores": os.cpu_count(), "runs": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
