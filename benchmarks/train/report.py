"""The short tables of a run, from what its file says. Never imports torch.

python -m benchmarks.train.report FILE.json ...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.train.waterfall import ITEMS

GIB = 2**30


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print speed, ceiling, waterfalls and memory, as far as they are there."""
    job = found["job"]
    title = f"{job['shape']['name']}, {job['parallel']}, {found['device']}, {job['dtype']}"
    console.print(_speed(found, title))
    for name, peer in found["peers"].items():
        if fused := peer.get("about", {}).get("found by the compiler"):
            told = ", ".join(f"{count} {what}" for what, count in fused.items())
            console.print(f"{name}: the compiler found {told}", highlight=False, markup=False)
    for peer in found["peers"].values():
        if "gone" in peer:
            console.print(peer["gone"], highlight=False, markup=False)
    if "ceiling" in found:
        console.print(_ceiling(found["ceiling"]))
    traced = {name: peer for name, peer in found["peers"].items() if "waterfall" in peer}
    inside = {name: peer for name, peer in traced.items() if all("items_ms" in rank for rank in peer["waterfall"])}
    for name in traced.keys() - inside.keys():
        console.print(f"{name}, no waterfall: {traced[name]['waterfall']}", highlight=False, markup=False)
    if inside:
        console.print(_waterfalls(inside))
    held = {name: peer["memory_bytes"] for name, peer in found["peers"].items() if "memory_bytes" in peer}
    if held:
        console.print(_memory(held))


def _speed(found: Mapping[str, Any], title: str) -> Table:
    table = Table(
        "peer",
        "tokens/s/GPU",
        "ms/step",
        "p10 .. p90",
        "TFLOP/s full",
        "causal",
        "MFU full",
        "causal",
        "of ceiling",
        "peak GiB",
        "loss after warm-up",
        title=title,
    )
    for name, peer in found["peers"].items():
        if "ms" not in peer:
            continue
        ms = peer["ms"]
        table.add_row(
            name,
            f"{peer['tokens_per_second_per_gpu']:,.0f}",
            f"{ms['median']:.2f}",
            f"{ms['p10']:.2f} .. {ms['p90']:.2f}",
            f"{peer['tflops_full']:.1f}",
            f"{peer['tflops_causal']:.1f}",
            f"{peer['mfu_full']:.1%}",
            f"{peer['mfu_causal']:.1%}",
            f"{peer['share_of_ceiling']:.1%}" if "share_of_ceiling" in peer else "",
            " ".join(f"{peak / GIB:.1f}" for peak in peer["peak_bytes"]),
            f"{peer['loss_after_warmup']:.4f}",
        )
    return table


def _ceiling(ceiling: Mapping[str, Any]) -> Table:
    table = Table("ceiling", "ms", title=f"{ceiling['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU at best")
    for name, ms in ceiling["items_ms"].items():
        table.add_row("GEMMs" if name == "products" else name, f"{ms:.2f}")  # results of before keep their key
    table.add_row("sum", f"{ceiling['step_ms']:.2f}")
    return table


def _waterfalls(peers: Mapping[str, Any]) -> Table:
    """A column for each rank of each peer."""
    ranks = [(f"{name} {rank}", fall) for name, peer in peers.items() for rank, fall in enumerate(peer["waterfall"])]
    table = Table("ms of one step", *(name for name, _ in ranks), title="waterfall")
    for item in ITEMS:
        table.add_row(item, *(f"{fall['items_ms'][item]:.2f}" for _, fall in ranks))
    table.add_row("sum", *(f"{fall['sum_ms']:.2f}" for _, fall in ranks))
    table.add_row("step without profiler", *(f"{fall['step_ms']:.2f}" for _, fall in ranks))
    table.add_row("within 2 %", *("yes" if fall["holds"] else "NO" for _, fall in ranks))
    return table


def _memory(held: Mapping[str, Any]) -> Table:
    ranks = [(f"{name} {rank}", items) for name, ranks in held.items() for rank, items in enumerate(ranks)]
    table = Table("GiB", *(name for name, _ in ranks), title="memory")
    longest = max((items for _, items in ranks), key=len)  # peers have most items in common, in this order
    for item in longest:
        table.add_row(item, *(f"{items.get(item, 0) / GIB:.2f}" for _, items in ranks))
    return table


def main(files: Sequence[str]) -> None:
    """The tables of runs that are over, or were cut."""
    for file in files:
        show(json.loads(Path(file).read_text()), Console(width=140))


if __name__ == "__main__":
    main(sys.argv[1:])
