"""Calls of several ranks side by side, as text for a terminal or a log."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from stretto.collective_trace.call import CollectiveCall

MOST = 64
"""Ranks that a table shows."""

HEAD = ("rank", "group", "call", "op", "shape", "dtype", "call site", "")


def table(
    what: str,
    calls: Mapping[int, CollectiveCall | None],
    notes: Mapping[int, str],
    others: Mapping[int, CollectiveCall | None],
) -> str:
    """`what` happened, then a line for each rank of `calls`, and below them the last calls of the `others`."""
    calls, more = _bounded(calls, notes)
    others, more_others = _bounded(others, notes)
    rows = [_row(rank, call, notes.get(rank, "")) for rank, call in sorted(calls.items())]
    rows += [_row(rank, call, "last seen here") for rank, call in sorted(others.items())]
    widths = [max(len(row[n]) for row in (HEAD, *rows)) for n in range(len(HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (HEAD, *rows)]
    lines += [f".. and {more + more_others} ranks more"] * (more + more_others > 0)
    return "\n".join([what, *(f"  {line.rstrip()}" for line in lines)])


def _bounded(
    calls: Mapping[int, CollectiveCall | None], notes: Mapping[int, str]
) -> tuple[dict[int, CollectiveCall | None], int]:
    """So many calls as can be read, those with a note first; and how many are left out."""
    ranks = sorted(calls, key=lambda rank: (rank not in notes, rank))
    return {rank: calls[rank] for rank in ranks[:MOST]}, max(0, len(ranks) - MOST)


def _row(rank: int, call: CollectiveCall | None, note: str) -> tuple[str, ...]:
    if call is None:
        return (str(rank), "", "", "" if note else "no communication yet", "", "", "", note)
    shape = f"[{', '.join(map(str, call.shape))}]"
    return (str(rank), call.channel, str(call.number), call.op, shape, call.dtype, short(call.site), note)


def short(site: str) -> str:
    """A FILE:LINE as it can be found: from the current directory, or from that of the installed package."""
    path, _, line = site.rpartition(":")
    for root in (Path.cwd(), Path(__file__).parents[2]):
        if Path(path).is_relative_to(root):
            return f"{Path(path).relative_to(root)}:{line}"
    return site
