"""Schedules by name. A generator decides order alone; messages and weights come later, by `lower`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType
from typing import Final

from stretto.layout.schedules import FAMILIES, Family
from stretto.layout.stages import Shape
from stretto.schedule import families, vshape
from stretto.schedule.costs import Cost
from stretto.schedule.families import forward_only, gpipe, one_f_one_b
from stretto.schedule.ir import Schedule

__all__ = ["GENERATORS", "Generator", "forward_only", "gpipe", "one_f_one_b", "schedule_for", "stages_on_a_rank"]


@dataclass(frozen=True)
class Generator(Family):
    """A family of schedules, and what makes them: over p ranks, v stages a rank and m microbatches."""

    make: Callable[[int, int, int], Schedule] = field(kw_only=True)


def _auto(p: int, v: int, m: int, cost: Cost, shape: Shape | None = None, memory: float | None = None) -> Schedule:
    from stretto.schedule.search import caps, search  # which takes all others for candidates

    return search(p, v, m, cost, caps(p, v, memory), shape or FAMILIES["auto"].shape_of(v)).schedule


_MAKE: Final[Mapping[str, Callable[[int, int, int], Schedule]]] = MappingProxyType(
    {
        "auto": lambda p, v, m: _auto(p, v, m, Cost()),
        "1f1b": lambda p, _, m: one_f_one_b(p, m),
        "depth-first": families.depth_first,
        "dualpipev": lambda p, _, m: vshape.dualpipev(p, m),
        "gpipe": lambda p, _, m: gpipe(p, m),
        "interleaved": families.interleaved,
        "interleaved-zb": families.interleaved_zb,
        "looped-bfs": families.looped_bfs,
        "v-half": lambda p, _, m: vshape.v_half(p, m),
        "v-min": lambda p, _, m: vshape.v_min(p, m),
        "zb-h1": lambda p, _, m: families.zb_h1(p, m),
        "zb-h2": lambda p, _, m: families.zb_h2(p, m),
        "zbv": lambda p, _, m: vshape.zbv(p, m),
    }
)

GENERATORS: Final[Mapping[str, Generator]] = MappingProxyType(
    {name: Generator(**vars(family), make=_MAKE[name]) for name, family in FAMILIES.items()}
)


def schedule_for(
    name: str,
    p: int,
    m: int,
    v: int | None = None,
    cost: Cost | None = None,
    shape: Shape | None = None,
    memory: float | None = None,
) -> Schedule:
    """The schedule of this name for p pipeline ranks, m microbatches and v stages on each rank.

    `auto` is the quickest that `search` finds for `cost`, with the activations of `memory` microbatches, by default
    those of 1F1B; two stages on a rank lie in a V, unless `shape` says otherwise. Raises ScheduleError where it finds
    none.
    """
    v = stages_on_a_rank(name, v)
    if p < 1 or m < 1:
        raise ValueError(f"a pipeline of {p} ranks and {m} microbatches: both must be at least 1")
    return _auto(p, v, m, cost or Cost(), shape, memory) if name == "auto" else GENERATORS[name].make(p, v, m)


def stages_on_a_rank(name: str, v: int | None) -> int:
    """How many there are; ValueError for a number that the schedule of this name does not have."""
    if name not in GENERATORS:
        near = get_close_matches(name, GENERATORS, n=1)
        meant = f"did you mean {near[0]}?" if near else f"there are: {', '.join(sorted(GENERATORS))}"
        raise ValueError(f"no schedule is named {name!r}; {meant}")
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
