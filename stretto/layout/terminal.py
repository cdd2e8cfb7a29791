"""A layout in the terminal: a table of the axes, and coloured grids of ranks on their nodes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from rich.color import Color
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from stretto.layout.colours import colour
from stretto.layout.layout import Layout
from stretto.layout.picture import GREY, WHITE, Colour, blend, readable
from stretto.layout.ranks import ranges
from stretto.layout.sizes import DENSE, EXPERT
from stretto.layout.topology import Topology, reach

MOST_NODES = 16
"""Nodes, one a line, that a grid shows; of more, it shows the first and those of the chosen rank's peers."""


def show(console: Console, layout: Layout, topology: Topology, rank: int | None = None) -> None:
    """Print the axes, the peers of `rank` if one is chosen, and a grid for every axis of several ranks."""
    nodes = topology.nodes(layout.world)
    console.print(Text(f"{layout}", style="bold"))
    console.print(
        f"{layout.world:,} ranks on {nodes:,} node{'s' * (nodes > 1)} of {topology.gpus_per_node} GPUs", style="dim"
    )
    console.print()
    console.print(_table(layout, topology, rank))
    if layout.vpp > 1:
        console.print()
        console.print(_stages(layout, rank))
    coloured = console.color_system is not None and not console.no_color
    views: dict[str, tuple[str, ...]] = {"dense layers": DENSE}
    if layout.has_experts:
        views["experts"] = EXPERT[:-1]
    for title, axes in views.items():
        grids = [_grid(layout, topology, axis, rank, coloured) for axis in axes if layout.size(axis) > 1]
        if grids:
            console.print()
            console.print(Text(title, style="dim"))
            console.print(Columns(grids, padding=(1, 3)))
    if any(layout.size(axis) > 1 for axes in views.values() for axis in axes):
        key = "colour is the coordinate on the axis, from 0" if coloured else "each rank: its coordinate on the axis"
        console.print(Text(f"a line is a node; {key}", style="dim"))


def _table(layout: Layout, topology: Topology, rank: int | None) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    headings = ["axis", "size", "apart", "spans"] + ([] if rank is None else ["at", f"peers of rank {rank}"])
    for heading in headings:
        justify: Literal["left", "right"] = "right" if heading in ("size", "apart", "at") else "left"
        table.add_column(heading, justify=justify, no_wrap="peers" not in heading)
    for axis in _rows(layout):
        where = reach(layout, topology, axis)
        group = layout.group(rank or 0, axis)
        apart = str(group[1] - group[0]) if len(group) > 1 else ""
        cells = [axis, str(where.size), apart, str(where) if where.size > 1 else ""]
        if rank is not None:
            cells += [str(group.index(rank)), ranges(group, 6)]
        style = "dim" if where.size == 1 else "yellow" if axis in ("tp", "etp") and not where.inside else ""
        table.add_row(*cells, style=style)
    return table


def _stages(layout: Layout, rank: int | None) -> Table:
    """What of the model each pipeline rank holds."""
    table = Table("pp", f"holds of the {len(layout.placement)} stages", box=None, pad_edge=False, header_style="dim")
    here = None if rank is None else layout.coords(rank)["pp"]
    for place in range(layout.size("pp")):
        holds = ", ".join(map(str, layout.stages(layout.rank(pp=place))))
        table.add_row(str(place), holds, style="bold" if place == here else "")
    return table


def _rows(layout: Layout) -> Iterable[str]:
    """Axes with their levels below them; those of experts where there are any."""
    yield from layout.dense.levels
    if layout.has_experts:
        yield from (axis for axis in layout.expert.levels if axis != "pp")


def _grid(layout: Layout, topology: Topology, axis: str, rank: int | None, coloured: bool) -> RenderableType:
    """One line for each node, one cell for each rank, coloured by coordinate; strangers to `rank` are pale.

    Where there are no colours, the coordinate stands behind the rank: `5:1`.
    """
    gpus, size = min(topology.gpus_per_node, layout.world), layout.size(axis)
    group = None if rank is None else set(layout.group(rank, axis))
    nodes = topology.nodes(layout.world)
    wanted = sorted({*range(min(nodes, MOST_NODES)), *sorted({r // gpus for r in group or ()})[:MOST_NODES]})
    width = len(str(layout.world - 1)) + 2 + (0 if coloured else 1 + len(str(size - 1)))
    lines = []
    for before, node in zip([-1, *wanted], wanted, strict=False):
        if node != before + 1:
            lines.append(Text(f"  .. {node - before - 1:,} more nodes", style="dim"))
        line = Text.assemble((f"{node:>{len(str(nodes - 1))}} ", "dim"))
        for other in range(node * gpus, min((node + 1) * gpus, layout.world)):
            place = layout.coords(other)[axis]
            fill = colour(place, size)
            pale = group is not None and other not in group
            fill = blend(fill, WHITE, 0.75) if pale else fill
            ink = GREY if pale else readable(fill)
            style = Style(color=_rgb(ink), bgcolor=_rgb(fill), bold=other == rank, underline=other == rank)
            line.append(f"{other if coloured else f'{other}:{place}':^{width}}", style=style)
        lines.append(line)
    if (left := nodes - 1 - wanted[-1]) > 0:
        lines.append(Text(f"  .. {left:,} more nodes", style="dim"))
    return Group(Text(f"{axis} = {size}", style="bold"), *lines)


def _rgb(colour: Colour) -> Color:
    return Color.from_rgb(*colour)
