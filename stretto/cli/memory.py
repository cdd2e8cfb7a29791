"""The memory of a run for `stretto explain`: each stage's ledger, and which modes of sharding fit a device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rich.table import Table

from stretto.arguments import Arguments
from stretto.estimate import fitting, fullest, rank_ledger
from stretto.estimate.host import LEAST, fullest_node
from stretto.report.host_full import host_full
from stretto.report.leaner import leaner_and_leaner

MIB, GIB = 2**20, 2**30
MANY = 6
OTHERS: Final = "; `stretto plan` with the same words tries other layouts; more ranks or a shorter --seq-len need less"


def memory_table(args: Arguments) -> Table:
    """A row for each item that is not 0, a column for each rank of the pipeline, which may hold several stages; of
    many the first two and the last."""
    last, what = args.parallel.pp - 1, "stage" if args.parallel.stages_per_rank == 1 else "rank"
    stages = range(last + 1) if last < MANY else (0, 1, last)
    ledgers = {stage: rank_ledger(args, stage) for stage in stages}
    table = Table(box=None, pad_edge=True)
    table.add_column("", justify="left")
    for stage in stages:
        table.add_column(f"{what} {stage}", justify="right")
    for name in (*next(iter(ledgers.values())).items, "total", "host"):
        row = [getattr(one, name) for one in ledgers.values()]
        if any(row):
            table.add_row("in the host's memory" if name == "host" else name, *(f"{size / MIB:,.1f}" for size in row))
    table.add_row("at most in", *(one.moment for one in ledgers.values()))
    return table


def host_verdict(args: Arguments, limit: float | None) -> Iterator[str]:
    """What the ranks of a node take of its host, and whether that fits into `limit` bytes."""
    need = fullest_node(args)
    ranks = min(args.parallel.gpus_per_node or args.run.nproc or 1, args.run.nproc or 1)
    if limit is not None and (problem := host_full(args, fullest_node, ranks, limit)) is not None:
        yield from (f"{'WARNING: ' * (not n)}{line.strip()}" for n, line in enumerate(problem.splitlines()))
        return
    if need.total >= LEAST:
        there = "" if limit is None else f" of {limit / GIB:.1f}"
        who = f"{ranks} ranks of a host take" if ranks > 1 else "the rank of a host takes"
        yield f"{who} {need.total / GIB:.1f} GiB{there} of its memory: {need.said}"


def verdict(args: Arguments, limit: float | None) -> Iterator[str]:
    """What is counted how; and with a limit in GiB, whether the run fits and which modes of sharding would."""
    yield "weights, gradients, masters and optimizer are exact; all else is that of the moment when a rank holds most"
    if limit is None:
        return
    found = fitting(args, limit * GIB)
    most, fits = found[args.parallel.mode]
    what = "stage" if args.parallel.stages_per_rank == 1 else "rank"
    yield f"{most / GIB:.2f} GiB in the fullest {what} {'fit' if fits else 'do not fit'} into --hbm {limit:g}"
    for mode, (size, _) in found.items():
        yield f"--sharding {mode}: {size / GIB:.2f} GiB, {_room(size, limit)}"
    if not any(fits for _, fits in found.values()):
        words, most = _first_that_fits(args, limit * GIB)
        yield f"{words}: {most / GIB:.2f} GiB, {_room(most, limit)}{OTHERS if most > limit * GIB else ''}"


def _room(size: int, limit: float) -> str:
    return "fits" if size <= limit * GIB else f"{size / GIB - limit:.2f} too much"


def _first_that_fits(args: Arguments, limit: float) -> tuple[str, int]:
    """Settings that leave the layout alone, one more at a time, until the run fits; all of them where it never does."""
    words, most = "as it is", fullest(args)
    for words, found in leaner_and_leaner(args):  # noqa: B007
        if (most := fullest(found)) <= limit:
            break
    return words, most
