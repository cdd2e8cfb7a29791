"""`stretto layout`: show where each rank stands, who its peers are, and how far each axis reaches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stretto.console import console
from stretto.layout import DEFAULT_ORDER, Layout, Shape, Size, Topology, propose, warnings
from stretto.layout.draw import picture
from stretto.layout.terminal import show
from stretto.terminal import said_plainly, say

USAGE_ERROR = 2


@dataclass(frozen=True)
class Command:
    """Show a layout: its axes, the peers of a rank, and the ranks on their nodes.

    Sizes may have levels, innermost first: `--dp 8x2` shards over 8 ranks and keeps 2 replicas.
    """

    tp: str = "1"
    """Tensor parallel size."""
    cp: str = "1"
    """Context parallel size."""
    dp: str = "1"
    """Data parallel size."""
    pp: int = 1
    """Pipeline parallel size."""
    vpp: int = 1
    """Virtual stages: so many of the model's pp * vpp stages lie on each pipeline rank."""
    shape: Shape = "loop"
    """How stages go along the pipeline: each pass from the start, or to and fro in a v."""
    ep: int = 1
    """Expert parallel size."""
    etp: int = 1
    """Tensor parallel size inside an expert."""
    order: str = DEFAULT_ORDER
    """Axes from the fastest to the slowest, or `best` for the order that keeps the heaviest traffic closest."""
    expert_order: str | None = None
    """The same for the expert axes, as in etp-ep-edp-pp; by default it follows from the order."""
    rank: int | None = None
    """A rank whose coordinates and peers to show."""
    gpus_per_node: int = 8
    """GPUs in a node, filled in the order of ranks."""
    nodes_per_rack: int | None = None
    """Nodes in a rack."""
    propose: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compare the orders of the axes by how close they keep the traffic."""
    out: tuple[Path, ...] = ()
    """Files to draw the layout into: .svg or .png."""


def main(argv: Sequence[str]) -> int:
    """Run `stretto layout ...`; 0, or 2 when the sizes make no layout."""
    with said_plainly():
        command = tyro.cli(Command, args=list(argv), prog="stretto layout")
    try:
        _run(command, console())
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
        picture(layout, topology, command.rank).save(path)
        screen.print(f"\nwrote {path}")


def _size(name: str, text: str) -> Size:
    """`8` or `8x2`, levels innermost first."""
    parts = text.split("x")
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"{name}={text!r}: a size is a whole number, or one for each level, as in 8x2")
    sizes = tuple(int(part) for part in parts)
    return sizes if len(sizes) > 1 else sizes[0]
