"""A layout as a picture: for each axis, all ranks as cells on their nodes, coloured by coordinate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, sqrt

from stretto.layout.colours import colour
from stretto.layout.layout import Layout
from stretto.layout.picture import GREY, INK, LINE, WHITE, Colour, Picture, Rect, Words, blend, readable
from stretto.layout.topology import Reach, Topology, reach

MOST_NODES = 256
"""Nodes that a picture shows; of more, it shows the first."""

_PANEL = 300.0
_MARGIN = 28.0
_GAP = 26.0
_HEAD = 44.0


@dataclass(frozen=True)
class _Grid:
    """Where nodes and cells go in a panel; pixels."""

    gpus: int
    across: int
    nodes: int
    columns: int
    cell: float

    @property
    def rows(self) -> int:
        return ceil(self.nodes / self.columns)

    @property
    def down(self) -> int:
        return ceil(self.gpus / self.across)

    @property
    def space(self) -> float:
        """Between nodes, and half of it around the cells of a node."""
        return self.cell * 0.28

    @property
    def node_width(self) -> float:
        return self.across * self.cell + self.space

    @property
    def node_height(self) -> float:
        return self.down * self.cell + self.space

    @property
    def height(self) -> float:
        return self.rows * (self.node_height + self.space) - self.space

    def node(self, number: int) -> tuple[float, float]:
        row, column = divmod(number, self.columns)
        return column * (self.node_width + self.space), row * (self.node_height + self.space)

    def place(self, rank: int) -> tuple[float, float]:
        x, y = self.node(rank // self.gpus)
        row, column = divmod(rank % self.gpus, self.across)
        return x + self.space / 2 + column * self.cell, y + self.space / 2 + row * self.cell


def picture(layout: Layout, topology: Topology, rank: int | None = None) -> Picture:
    """Panels for the dense axes and, below, for those of the experts; `rank` and its peers stand out."""
    rows = [("Dense layers", [a for a in ("tp", "cp", "dp", "pp") if layout.size(a) > 1] or ["tp"])]
    if layout.has_experts:
        rows.append(("Experts", [a for a in ("etp", "ep", "edp") if layout.size(a) > 1]))
    grid = _grid(min(topology.nodes(layout.world), MOST_NODES), min(topology.gpus_per_node, layout.world))
    columns = max(len(axes) for _, axes in rows)
    width = max(2 * _MARGIN + columns * (_PANEL + _GAP) - _GAP, 560.0)
    shapes: list[Rect | Words] = [*_title(layout, topology, rank)]
    y = 92.0
    for title, axes in rows:
        shapes.append(Words(_MARGIN, y, title, 14, GREY, bold=True))
        y += 20
        for i, axis in enumerate(axes):
            x = _MARGIN + i * (_PANEL + _GAP)
            shapes += _panel(layout, reach(layout, topology, axis), grid, x, y, rank)
        y += _HEAD + grid.height + _GAP + 8
    shapes += _footer(layout, topology, y - 10)
    return Picture(width, y + 14, tuple(shapes))


def _grid(nodes: int, gpus: int) -> _Grid:
    """Nodes in about a square, cells as large as the panel allows."""
    across = gpus if gpus <= 4 or nodes <= 2 else ceil(gpus / 2)
    down = ceil(gpus / across)
    square = sqrt(nodes * down / across)
    whole = [n for n in range(1, nodes + 1) if nodes % n == 0 and square / 1.5 <= n <= square * 1.5]
    columns = min(whole, key=lambda n: abs(n - square)) if whole else max(1, round(square))
    cell = min(34.0, _PANEL / (columns * (across + 0.56)))
    return _Grid(gpus, across, nodes, columns, cell)


def _title(layout: Layout, topology: Topology, rank: int | None) -> Iterator[Words]:
    sizes = "  ".join(f"{axis} {layout.size(axis)}" for axis in ("tp", "cp", "dp", "pp", "etp", "ep", "edp"))
    dense, _, experts = sizes.partition("  etp ")
    yield Words(_MARGIN, 32, dense + (f"   |   etp {experts}" if layout.has_experts else ""), 20, bold=True)
    nodes = topology.nodes(layout.world)
    where = f"{layout.world:,} ranks on {nodes:,} node{'s' * (nodes > 1)} of {topology.gpus_per_node} GPUs"
    if layout.vpp > 1:
        where += f"   ·   {len(layout.placement)} stages in a {layout.shape}"
    if rank is not None:
        coords = layout.coords(rank)
        at = " ".join(f"{axis}={coords[axis]}" for axis in ("tp", "cp", "dp", "pp"))
        holds = f", stages {', '.join(map(str, layout.stages(rank)))}" if layout.vpp > 1 else ""
        where += f"   ·   rank {rank}: {at}{holds}, its peers in colour"
    yield Words(_MARGIN, 58, where, 13, GREY)


def _panel(layout: Layout, where: Reach, grid: _Grid, x: float, y: float, rank: int | None) -> Iterator[Rect | Words]:
    """One axis: a head, the nodes, the ranks."""
    (axis,) = where.axes
    crosses = axis in ("tp", "etp") and not where.inside
    yield Words(x, y + 8, f"{axis} = {where.size}", 15, bold=True)
    yield Words(x + _PANEL, y + 8, str(where), 11, (196, 62, 76) if crosses else GREY, anchor="end")
    yield from _scale(x, y + 20, where.size)
    peers = None if rank is None else set(layout.group(rank, axis))
    top = y + _HEAD
    for node in range(grid.nodes):
        left, up = grid.node(node)
        yield Rect(x + left, top + up, grid.node_width, grid.node_height, None, grid.space, LINE, 1.0)
    for other in range(min(layout.world, grid.nodes * grid.gpus)):
        left, up = grid.place(other)
        fill = colour(layout.coords(other)[axis], where.size)
        yield from _cell(x + left, top + up, grid.cell, other, fill, peers, own=other == rank)


def _cell(
    x: float, y: float, size: float, rank: int, fill: Colour, peers: set[int] | None, *, own: bool
) -> Iterator[Rect | Words]:
    faded = peers is not None and rank not in peers
    fill = blend(fill, WHITE, 0.82) if faded else fill
    inset = size * 0.05
    stroke = max(1.5, size * 0.09) if own else 0.0
    yield Rect(x + inset, y + inset, size - 2 * inset, size - 2 * inset, fill, size * 0.16, INK, stroke)
    if size >= 14:
        print_size = min(11.0, size * (0.42 if rank < 100 else 0.34))
        ink = GREY if faded else readable(fill)
        yield Words(x + size / 2, y + size / 2, str(rank), print_size, ink, own, "middle")


def _scale(x: float, y: float, count: int) -> Iterator[Rect]:
    """The colours in order of the coordinate, as a legend under the name of the axis."""
    steps = min(count, 60)
    width = min(_PANEL, steps * 12.0) / steps
    for i in range(steps):
        yield Rect(x + i * width, y, width, 5, colour(i, steps))


def _footer(layout: Layout, topology: Topology, y: float) -> Iterator[Words]:
    note = "each box is a node; colour is the coordinate on the axis, from 0"
    if topology.nodes(layout.world) > MOST_NODES:
        note += f"; the first {MOST_NODES} of {topology.nodes(layout.world):,} nodes are shown"
    yield Words(_MARGIN, y, note, 11, GREY)
