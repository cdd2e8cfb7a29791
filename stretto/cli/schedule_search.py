"""`stretto schedule search`: the quickest order, in each placement, and with --layers over the splits of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from stretto.layout.stages import placement
from stretto.schedule import Cost, Schedule, ScheduleError
from stretto.schedule.exact import solve
from stretto.schedule.pieces import Pieces, pieces_in
from stretto.schedule.placements import PLACEMENTS, Placed, quickest, search_layers, search_placements
from stretto.schedule.search import caps
from stretto.terminal import say

if TYPE_CHECKING:
    from stretto.cli.schedule import Command

T = TypeVar("T")


def spread(times: tuple[float, ...] | None, unset: T) -> float | tuple[float, ...] | T:
    """Times of all stages, or of each; where none are said, others."""
    return unset if times is None else times[0] if len(times) == 1 else times


def searched(said: Command, costs: Callable[[Schedule], Cost], read: Callable[[str], str]) -> tuple[Placed, Cost]:
    """Over the placements, or those of --vpp, or those for which costs are given; with --layers over their splits."""
    if said.schedule:
        raise ValueError(f"search takes no schedule, got {' '.join(said.schedule)}")
    p, m = said.pp, said.microbatches
    pieces, found = _pieces(said, read), dict[Placed, Cost]()
    places = [(v, shape) for v, shape in PLACEMENTS if said.vpp in (None, v)] or [(said.vpp or 1, "loop")]

    for place in places:
        try:
            if pieces is not None:
                best = search_layers(*pieces, p, place[0], m, place[1], said.memory)
                cost = pieces[0].cost(best.layers or ())
            else:
                cost = costs(Schedule(placement(p, *place), m, [()] * p))
                if cost.num_stages not in (None, p * place[0]):
                    continue
                best = search_placements(p, m, lambda *_, cost=cost: cost, memory=said.memory, placements=[place])[0]
            if said.exact is not None:
                best = _exact(said, best, cost)
        except ScheduleError as error:
            say(f"passed over: {error}", out=True)
            continue
        found[best] = cost
        say(
            f"{best}: {best.found.origin}, a step takes {best.found.time:g}, at most {best.found.gap:.1%} above the "
            "best there is",
            out=True,
        )
    if not found:
        raise ValueError("no schedule was found: allow more --memory, or another --vpp")
    best = quickest(list(found))
    say(f"quickest: {best}, {best.found.origin}", out=True)
    return best, found[best]


def _pieces(said: Command, read: Callable[[str], str]) -> tuple[Pieces, int] | None:
    """What the pieces of the model take, and how many layers there are, where --layers says that."""
    if said.layers is None:
        if said.head or said.embedding or said.attention is not None:
            raise ValueError("--head and --embedding are in layers, --attention is of one: say --layers too")
        return None
    shares = None if said.attention is None else (said.attention,) * 3
    if said.costs is not None:
        return pieces_in(read(said.costs), said.costs, shares), said.layers
    times = [spread(each, None) for each in (said.forward, said.input_gradient, said.weight_gradient)]
    f, i, w = (1.0 if each is None else each for each in times)
    if not isinstance(f, float) or not isinstance(i, float) or not isinstance(w, float):
        raise ValueError("with --layers, times are those of one layer: one number each")
    return Pieces(
        (f, i, w),
        tuple(said.embedding * x for x in (f, i, w)),  # type: ignore[arg-type]
        (said.head * (f + i + w), 0.0, 0.0),
        shares,
        hop=said.hop,
        transfer=said.transfer,
        finish=said.finish,
    ), said.layers


def _exact(said: Command, best: Placed, cost: Cost) -> Placed:
    """The same stages in the order that a solver finds."""
    cap = caps(said.pp, best.v, said.memory)
    found = solve(said.pp, best.v, said.microbatches, cost, cap, best.shape, seconds=said.exact or 0.0)
    return replace(best, found=found)
