"""`stretto layout`: show where each rank stands, who its peers are, and how far each axis reaches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stretto.arguments.form import Form
from stretto.arguments.setting import MOST_RANKS, setting
from stretto.cli.command import USAGE_ERROR, options
from stretto.console import console
from stretto.layout import DEFAULT_ORDER, Layout, Shape, Size, Topology, propose, warnings
from stretto.layout.draw import picture
from stretto.layout.terminal import show
from stretto.reading import reason
from stretto.terminal import say


@dataclass(frozen=True)
class Command:
    """Show a layout: its axes, the peers of a rank, and the ranks on their nodes.

    Sizes may have levels, innermost first: `--dp 8x2` shards over 8 ranks and keeps 2 replicas.
    """

    tp: str = setting("1", "tensor parallel size")
    cp: str = setting("1", "context parallel size")
    dp: str = setting("1", "data parallel size")
    pp: int = setting(1, "pipeline parallel size", at_least=1)
    vpp: int = setting(1, "so many of the model's pp * vpp stages lie on each pipeline rank", at_least=1)
    shape: Shape = setting("loop", "how stages go along the pipeline: from the start, or to and fro in a v")  # noqa: RUF009
    ep: int = setting(1, "expert parallel size", at_least=1)
    etp: int = setting(1, "tensor parallel size inside an expert", at_least=1)
    order: str = setting(
        DEFAULT_ORDER,
        "axes from the fastest to the slowest, or best: the order that keeps the heaviest traffic closest",
    )
    expert_order: str | None = setting(
        None, "the same for the expert axes, as in etp-ep-edp-pp; unset: it follows from the order"
    )
    rank: int | None = setting(None, "a rank whose coordinates and peers to show")
    gpus_per_node: int = setting(8, "GPUs in a node, filled in the order of ranks", at_least=1)
    nodes_per_rack: int | None = setting(None, "nodes in a rack")
    propose: bool = setting(False, "compare the orders of the axes by how close they keep the traffic")
    out: tuple[str, ...] = setting((), "files to draw the layout into: .svg or .png", path=True)


FORMS: Final = (Form("stretto layout", Command),)


def main(argv: Sequence[str]) -> int:
    """Run `stretto layout ...`; 0, or 2 when the sizes make no layout."""
    command = options(FORMS[0], argv)
    try:
        _run(command, console())
    except OSError as error:
        say(f"stretto layout: cannot write {error.filename}: {reason(error)}")
        return USAGE_ERROR
    except ValueError as error:
        say(f"stretto layout: {error}")
        return USAGE_ERROR
    return 0


def _run(command: Command, screen: Console) -> None:
    tp, cp, dp = (_size(name, getattr(command, name)) for name in ("tp", "cp", "dp"))
    pp, ep, etp = command.pp, command.ep, command.etp
    topology = Topology(command.gpus_per_node, command.nodes_per_rack)
    orders = []
    if command.propose or command.order == "best":
        orders = propose(topology, tp=tp, cp=cp, dp=dp, pp=pp, ep=ep, etp=etp)
    order = orders[0].order if command.order == "best" else command.order
    layout = Layout.of(
        tp=tp,
        cp=cp,
        dp=dp,
        pp=pp,
        ep=ep,
        etp=etp,
        order=order,
        expert_order=command.expert_order,
        vpp=command.vpp,
        shape=command.shape,
    )
    if layout.world > MOST_RANKS:
        raise ValueError(f"tp*cp*dp*pp = {layout.world:,} ranks, must be <= {MOST_RANKS:,}")
    if command.rank is not None:
        layout.coords(command.rank)  # reject a rank outside before anything is printed
    show(screen, layout, topology, command.rank)
    for warning in warnings(layout, topology):
        screen.print(Text.assemble("\n", ("warning:", "yellow"), f" {warning}"))
    if command.propose:
        table = Table("order", "relative time of its traffic", box=None, pad_edge=False, header_style="dim")
        for proposal in orders[:6]:
            table.add_row(proposal.order, f"{proposal.cost:.2f}")
        screen.print()
        screen.print(table)
    for path in command.out:
        picture(layout, topology, command.rank).save(Path(path))
        screen.print(f"\nwrote {path}")


def _size(name: str, text: str) -> Size:
    """`8` or `8x2`, levels innermost first."""
    parts = text.split("x")
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"{name}={text!r}: a size is a whole number, or one for each level, as in 8x2")
    sizes = tuple(int(part) for part in parts)
    return sizes if len(sizes) > 1 else sizes[0]
