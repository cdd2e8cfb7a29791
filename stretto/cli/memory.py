"""The memory of a run for `stretto explain`: each stage's ledger, and which modes of sharding fit a device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from rich.table import Table

from stretto.arguments import Arguments
from stretto.arguments.pipeline import vpp_of
from stretto.estimate import Ledger, fitting, rank_ledger

MIB, GIB = 2**20, 2**30
MANY = 6


def memory_table(args: Arguments) -> Table:
    """A row for each item that is not 0, a column for each rank of the pipeline, which may hold several stages; of
    many the first two and the last."""
    last, what = args.parallel.pp - 1, "stage" if vpp_of(args.parallel) == 1 else "rank"
    stages = range(last + 1) if last < MANY else (0, 1, last)
    ledgers = {stage: rank_ledger(args, stage) for stage in stages}
    table = Table(box=None, pad_edge=True)
    table.add_column("", justify="left")
    for stage in stages:
        table.add_column(f"{what} {stage}", justify="right")
    own = [each.name for each in fields(Ledger) if each.name != "host"]
    for name in (*own, "total", "host"):
        row = [getattr(one, name) for one in ledgers.values()]
        if any(row):
            table.add_row("in the host's memory" if name == "host" else name, *(f"{size / MIB:,.1f}" for size in row))
    return table


def verdict(args: Arguments, limit: float | None) -> Iterator[str]:
    """What is counted how; and with a limit in GiB, whether the run fits and which modes of sharding would."""
    yield "weights, gradients, masters and optimizer are exact; activations and logits are counted by tensor"
    if limit is None:
        return
    found = fitting(args, limit * GIB)
    most, fits = found[args.parallel.sharding]
    what = "stage" if vpp_of(args.parallel) == 1 else "rank"
    yield f"{most / GIB:.2f} GiB in the fullest {what} {'fit' if fits else 'do not fit'} into --hbm {limit:g}"
    for mode, (size, enough) in found.items():
        yield f"--sharding {mode}: {size / GIB:.2f} GiB, {'fits' if enough else f'{size / GIB - limit:.2f} too much'}"
