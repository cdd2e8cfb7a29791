"""Schedules by name. A generator decides order alone; messages and weights come later, by `lower`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from stretto.layout.stages import Shape
from stretto.schedule import families, vshape
from stretto.schedule.costs import Cost
from stretto.schedule.families import forward_only, gpipe, one_f_one_b
from stretto.schedule.ir import Schedule

__all__ = ["GENERATORS", "Generator", "forward_only", "gpipe", "one_f_one_b", "schedule_for", "stages_on_a_rank"]


@dataclass(frozen=True)
class Generator:
    """A family of schedules, over p ranks, v stages a rank and m microbatches."""

    make: Callable[[int, int, int], Schedule]
    stages: int
    """Stages on a rank, where the user says nothing."""
    any_stages: bool
    """Whether there may be another number of them."""
    shape: Shape
    """How the stages lie on the ranks, where there are several."""
    splits: bool
    """Whether backwards are split, some or all."""


def _auto(p: int, v: int, m: int, cost: Cost) -> Schedule:
    from stretto.schedule.search import search  # which takes all others for candidates

    return search(p, v, m, cost, [v * p] * p, "v").schedule


def _single(make: Callable[[int, int], Schedule], *, splits: bool = False) -> Generator:
    return Generator(lambda p, _, m: make(p, m), 1, False, "loop", splits)


def _loop(make: Callable[[int, int, int], Schedule], *, splits: bool = False) -> Generator:
    return Generator(make, 2, True, "loop", splits)


def _v(make: Callable[[int, int], Schedule]) -> Generator:
    return Generator(lambda p, _, m: make(p, m), 2, False, "v", True)


GENERATORS: Final[Mapping[str, Generator]] = MappingProxyType(
    {
        "auto": Generator(lambda p, v, m: _auto(p, v, m, Cost()), 2, False, "v", True),
        "1f1b": _single(one_f_one_b),
        "depth-first": _loop(families.depth_first),
        "dualpipev": _v(vshape.dualpipev),
        "gpipe": _single(gpipe),
        "interleaved": _loop(families.interleaved),
        "interleaved-zb": _loop(families.interleaved_zb, splits=True),
        "looped-bfs": _loop(families.looped_bfs),
        "v-half": _v(vshape.v_half),
        "v-min": _v(vshape.v_min),
        "zb-h1": _single(families.zb_h1, splits=True),
        "zb-h2": _single(families.zb_h2, splits=True),
        "zbv": _v(vshape.zbv),
    }
)


def schedule_for(name: str, p: int, m: int, v: int | None = None, cost: Cost | None = None) -> Schedule:
    """The schedule of this name for p pipeline ranks, m microbatches and v stages on each rank.

    `auto` is the quickest in a V that `search` finds for `cost`, with the activations of 1F1B.
    """
    v = stages_on_a_rank(name, v)
    if p < 1 or m < 1:
        raise ValueError(f"a pipeline of {p} ranks and {m} microbatches: both must be at least 1")
    return _auto(p, v, m, cost) if name == "auto" and cost is not None else GENERATORS[name].make(p, v, m)


def stages_on_a_rank(name: str, v: int | None) -> int:
    """How many there are; ValueError for a number that the schedule of this name does not have."""
    if name not in GENERATORS:
        raise ValueError(f"no schedule is named {name!r}; there are: {', '.join(sorted(GENERATORS))}")
    made = GENERATORS[name]
    v = made.stages if v is None else v
    if v < 1:
        raise ValueError(f"{v} stages on a rank: at least 1")
    if v != made.stages and not made.any_stages:
        others = ", ".join(n for n, g in GENERATORS.items() if g.any_stages)
        raise ValueError(
            f"{name} has {made.stages} stage{'s' * (made.stages > 1)} on a rank, not {v}; of any number are {others}"
        )
    return v
