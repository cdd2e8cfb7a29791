"""What the ranks of a layout send in a step, as a table."""

from __future__ import annotations

from rich import box
from rich.console import Group, JustifyMethod
from rich.table import Table
from rich.text import Text

from stretto.layout.ranks import ranges
from stretto.verify.comms import Communication, Sent
from stretto.verify.textbook_experts import EXCHANGE

_RANKS_SHOWN = 8


def communication_table(found: Communication, title: str) -> Group:
    """A line for each axis and operation, where the ranks of a group part ways, and the verdict."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    table.caption = "bytes that one rank sends in one step: the rank that sends most, or the first that is not right"
    for column in ("axis", "operation", "rank", "calls", "bytes", "textbook", ""):
        justify: JustifyMethod = "left" if column in ("axis", "operation", "") else "right"
        table.add_column(column, justify=justify, overflow="fold")
    for each in found.sent:
        volume = each.measured
        table.add_row(
            each.axis,
            each.op,
            str(each.rank),
            f"{volume.calls:,}",
            f"{volume.bytes:,.0f}",
            f"{each.textbook:,.0f}",
            _note(each),
        )
    parts: list[Table | Text] = [table, *(Text(_origin(each)) for each in found.sent if each.off)]
    parts += (Text(str(each), style="red") for each in found.divergences)
    if found.orthogonalizing.calls:
        muon = found.orthogonalizing
        parts.append(
            Text(f"beside it Muon's matrices, without a textbook: {muon.calls:,} calls, {muon.bytes:,.0f} bytes")
        )
    if not found.divergences:
        parts.append(Text(f"all ranks of each group agree in operation, shape and dtype, {found.calls:,} calls in all"))
    verdict = "as expected" if found.right else "DIFFERENT from what is expected"
    parts.append(Text(f"{verdict}: what the step sends", style="bold green" if found.right else "bold red"))
    return Group(*parts)


def _origin(sent: Sent) -> str:
    """Who asked for what is not as it should be."""
    asked = ", ".join(f"{calls:,} at {site}" for site, calls in sent.sites) or "no call"
    return f"{sent.axis} {sent.op} of rank {sent.rank}: {asked}\n"


def _note(sent: Sent) -> Text:
    if not sent.off:
        more = sent.measured.bytes - sent.textbook
        if (sent.axis, sent.op) == EXCHANGE and abs(more) > 0.5:
            return Text.assemble(("as routed", "green"), f": {more / sent.textbook:+.0%} of that of equal loads")
        return Text.assemble(("equal", "green"), f", and {more:,.0f} of padding" if more > 0.5 else "")
    return Text.assemble(("not equal", "red"), f" on {ranges(sent.off, _RANKS_SHOWN)}")
