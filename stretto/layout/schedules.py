"""What schedules there are, without making any: what settings and help ask, so nothing here imports numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from stretto.layout.stages import Shape


@dataclass(frozen=True)
class Family:
    """What schedules of one name have in common."""

    says: str = field(compare=False)
    """What it is, in a few words; families that differ in it alone are of one kind."""
    stages: int = 1
    """Stages on a rank, where the user says nothing."""
    any_stages: bool = False
    """Whether there may be another number of them."""
    shape: Shape = "loop"
    """How the stages lie on the ranks, where there are several."""
    any_shape: bool = False
    """Whether they may lie otherwise: two in a loop; more do in any case."""
    splits: bool = False
    """Whether backwards are split, some or all."""

    def shape_of(self, stages: int) -> Shape:
        """How so many stages on a rank lie, where the user says nothing."""
        return "loop" if stages == 1 or (self.any_shape and stages != self.stages) else self.shape

    def shapes(self, stages: int) -> tuple[Shape, ...]:
        """How so many can lie; a V has two."""
        usual = self.shape_of(stages)
        return (usual, "loop") if self.any_shape and usual == "v" else (usual,)


FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {
        "auto": Family(
            "the quickest that a search finds for these costs",
            2,
            any_stages=True,
            shape="v",
            any_shape=True,
            splits=True,
        ),
        "1f1b": Family("one forward, one backward in turn"),
        "depth-first": Family("interleaved in groups of exactly pp microbatches", 2, any_stages=True),
        "dualpipev": Family("DualPipe in a V: a forward beside a backward", 2, shape="v", splits=True),
        "gpipe": Family("all forwards, then all backwards"),
        "interleaved": Family("1f1b over several stages a rank", 2, any_stages=True),
        "interleaved-zb": Family(
            "interleaved with weight gradients put where a rank idles", 2, any_stages=True, splits=True
        ),
        "looped-bfs": Family("gpipe over several stages a rank", 2, any_stages=True),
        "v-half": Family("half the activations of 1f1b", 2, shape="v", splits=True),
        "v-min": Family("a third of the activations of 1f1b", 2, shape="v", splits=True),
        "zb-h1": Family("1f1b with weight gradients put where a rank idles", splits=True),
        "zb-h2": Family("zero bubble for twice the activations", splits=True),
        "zbv": Family("zero bubble in a V, at the activations of 1f1b", 2, shape="v", splits=True),
    }
)
