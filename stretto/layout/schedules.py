"""What schedules there are, without making any: what settings and help ask, so nothing here imports numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from stretto.layout.stages import Shape


@dataclass(frozen=True)
class Family:
    """What schedules of one name have in common."""

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


_LOOP, _V = Family(2, any_stages=True), Family(2, shape="v", splits=True)
_AUTO = Family(2, any_stages=True, shape="v", any_shape=True, splits=True)

FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {
        "auto": _AUTO,
        "1f1b": Family(),
        "depth-first": _LOOP,
        "dualpipev": _V,
        "gpipe": Family(),
        "interleaved": _LOOP,
        "interleaved-zb": Family(2, any_stages=True, splits=True),
        "looped-bfs": _LOOP,
        "v-half": _V,
        "v-min": _V,
        "zb-h1": Family(splits=True),
        "zb-h2": Family(splits=True),
        "zbv": _V,
    }
)
