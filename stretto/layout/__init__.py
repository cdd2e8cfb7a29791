"""Rank geometry: which place each rank has on each named axis, and who its peers are. Integers only."""

from stretto.layout.layout import EMBED, Layout
from stretto.layout.sizes import DEFAULT_ORDER, DENSE, EXPERT, Size
from stretto.layout.stages import Shape
from stretto.layout.topology import Proposal, Reach, Topology, propose, reach, warnings

__all__ = [
    "DEFAULT_ORDER",
    "DENSE",
    "EMBED",
    "EXPERT",
    "Layout",
    "Proposal",
    "Reach",
    "Shape",
    "Size",
    "Topology",
    "propose",
    "reach",
    "warnings",
]
