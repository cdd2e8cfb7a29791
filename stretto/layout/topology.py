"""Where the axes of a layout lie on the machines, and which order keeps the heaviest traffic closest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from types import MappingProxyType

from stretto.layout.layout import Layout
from stretto.layout.sizes import DEFAULT_ORDER, Size
from stretto.layout.view import View

TRAFFIC: Mapping[str, float] = MappingProxyType(
    {"tp": 8.0, "etp": 8.0, "ep": 8.0, "cp": 1.5, "dp": 0.75, "edp": 0.75, "pp": 0.2}
)
"""Bytes that a rank moves along each axis, per layer and microbatch, in units of one activation [s, b, h].

Tensor parallel with sequence parallel gathers and scatters 4 activations forward and 4 backward; experts with
two of them per token dispatch and combine as many; a ring of context passes keys and values, a quarter of an
activation each with grouped queries, forward, and they and their gradients backward. Data parallel moves the
layer's gradients, 12 h^2 elements over s b h, once for all microbatches (h=4096, s=8192, 8 microbatches); a
pipeline 2 activations for a whole stage, of some 10 layers. Give your own figures where they differ.
"""

NETWORK_SLOWDOWN = 9.0
"""One GPU's link inside a node over its link to the network, as of 450 GB/s NVLink over 50 GB/s per NIC."""


@dataclass(frozen=True)
class Topology:
    """Ranks fill nodes of `gpus_per_node` in order, and nodes fill racks of `nodes_per_rack`, if given."""

    gpus_per_node: int = 8
    nodes_per_rack: int | None = None

    def __post_init__(self) -> None:
        for name, count in (("gpus_per_node", self.gpus_per_node), ("nodes_per_rack", self.nodes_per_rack)):
            if count is not None and count < 1:
                raise ValueError(f"{name}={count}: at least 1")

    def nodes(self, ranks: int) -> int:
        """Number of nodes that so many ranks fill, the last perhaps in part."""
        return -(-ranks // self.gpus_per_node)

    @property
    def gpus_per_rack(self) -> int | None:
        """GPUs in a rack."""
        return None if self.nodes_per_rack is None else self.gpus_per_node * self.nodes_per_rack


@dataclass(frozen=True)
class Reach:
    """How far the groups of an axis spread: nodes and racks of the widest, company of the loneliest rank.

    `company` is the fewest ranks of a group that share a node (with others or alone): that many links to the
    network carry what the group sends out of the node.
    """

    axes: tuple[str, ...]
    size: int
    nodes: int
    racks: int | None
    company: int

    @property
    def inside(self) -> bool:
        """Whether all groups stay inside a node."""
        return self.nodes == 1

    @property
    def slowdown(self) -> float:
        """Time per byte over that inside a node: nodes join the links of all their ranks in the group."""
        return 1.0 if self.inside else max(1.0, NETWORK_SLOWDOWN / self.company)

    def __str__(self) -> str:
        if self.inside:
            return "inside a node"
        racks = "" if self.racks is None else f", {self.racks} racks" if self.racks > 1 else ", inside a rack"
        return f"{self.nodes} nodes{racks}"


def reach(layout: Layout, topology: Topology, *axes: str) -> Reach:
    """How far the groups along `axes` spread, the worst of them, without going through them all."""
    view = layout.dense if set(axes) <= set(layout.dense.levels) else layout.expert
    digits = view.digits_of(axes)
    offsets = view.span({name: range(size) for name, size in view.digits if name in digits})
    nodes, company = _spread(view, digits, offsets, topology.gpus_per_node)
    racks = None
    if topology.gpus_per_rack is not None:
        racks, _ = _spread(view, digits, offsets, topology.gpus_per_rack)
    return Reach(axes, len(offsets), nodes, racks, company)


def warnings(layout: Layout, topology: Topology) -> list[str]:
    """What in this layout is likely to be slow on these machines."""
    found = []
    for axis in ("tp", "etp"):
        where = reach(layout, topology, axis)
        if not where.inside:
            found.append(
                f"{axis}={where.size} spans {where.nodes} nodes of {topology.gpus_per_node} GPUs, and every layer "
                f"waits for it several times: keep it inside a node, with {axis}<={topology.gpus_per_node} "
                f"and an order that begins with tp"
            )
    if layout.world > topology.gpus_per_node and layout.world % topology.gpus_per_node:
        found.append(f"{layout.world} ranks leave the last node of {topology.gpus_per_node} GPUs partly empty")
    return found


@dataclass(frozen=True)
class Proposal:
    """An order of the axes, its layout, and the relative time of its traffic."""

    order: str
    layout: Layout
    cost: float


def propose(
    topology: Topology,
    *,
    tp: Size = 1,
    cp: Size = 1,
    dp: Size = 1,
    pp: int = 1,
    ep: int = 1,
    etp: int = 1,
    traffic: Mapping[str, float] = TRAFFIC,
) -> list[Proposal]:
    """All orders of these sizes, the one that keeps the heaviest traffic closest first.

    The cost is the sum over axes of more than one rank of bytes times slowdown; of equal orders, the one
    nearest to the default comes first.
    """
    found = []
    for order in _orders(tp=tp, cp=cp, ep=ep, dp=dp, pp=pp):
        try:
            layout = Layout.of(tp=tp, cp=cp, dp=dp, pp=pp, ep=ep, etp=etp, order=order)
        except ValueError:  # experts do not fit this order
            continue
        found.append(Proposal(order, layout, _cost(layout, topology, traffic)))
    if not found:
        Layout.of(tp=tp, cp=cp, dp=dp, pp=pp, ep=ep, etp=etp)  # the sizes themselves are wrong: say how
    return sorted(found, key=lambda proposal: proposal.cost)


def _orders(**sizes: Size) -> Iterator[str]:
    """Permutations of the axes, nearest to the default first, those of size 1 left where they are."""
    names = DEFAULT_ORDER.split("-")
    # Experts may lie along tp and dp even where these have one rank.
    fixed = {name for name in ("cp", "ep", "pp") if sizes[name] == 1}
    for order in permutations([name for name in names if name not in fixed]):
        moving = iter(order)
        yield "-".join(name if name in fixed else next(moving) for name in names)


def _cost(layout: Layout, topology: Topology, traffic: Mapping[str, float]) -> float:
    axes = ["tp", "cp", "dp", "pp", *(("etp", "ep", "edp") if layout.has_experts else ())]
    return sum(
        traffic.get(axis, 0.0) * reach(layout, topology, axis).slowdown for axis in axes if layout.size(axis) > 1
    )


def _spread(view: View, digits: set[str], offsets: Sequence[int], unit: int) -> tuple[int, int]:
    """Most units of `unit` ranks that a group of these offsets touches; fewest of its ranks in one of them."""
    most, fewest = 1, unit
    for start in _residues(view, digits, unit):
        shares = Counter((start + offset) // unit for offset in offsets)
        most, fewest = max(most, len(shares)), min(fewest, *shares.values())
    return most, fewest


def _residues(view: View, digits: set[str], unit: int) -> set[int]:
    """Where in a unit the groups over `digits` may begin: only this matters, and there are at most `unit`."""
    residues = {0}
    for name, size in view.digits:
        if name not in digits:
            stride = view.strides[name]
            steps = {value * stride % unit for value in range(min(size, unit))}
            residues = {(residue + step) % unit for residue in residues for step in steps}
    return residues
