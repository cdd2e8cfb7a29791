"""Which stages lie where, and which layers are in each: searched together with the order, for given costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from stretto.layout.stages import Shape
from stretto.schedule.blocks import counts_text
from stretto.schedule.costs import Cost
from stretto.schedule.cut import WORTH
from stretto.schedule.generators import schedule_for
from stretto.schedule.greedy import most_alive
from stretto.schedule.ir import Schedule, ScheduleError
from stretto.schedule.partition import balanced
from stretto.schedule.pieces import Pieces
from stretto.schedule.search import Found, caps, lower_bound, names_in, search
from stretto.schedule.simulate import simulate, step_time

Layers = tuple[float, ...]
"""Of each stage, in halves where blocks are cut between attention and feed-forward."""

PLACEMENTS: Final[tuple[tuple[int, Shape], ...]] = ((1, "loop"), (2, "v"), (2, "loop"), (3, "loop"), (4, "loop"))
"""Stages on a rank, and how they lie: the fewest first."""
_ORDERS: Final = 3
"""Of those that split layers are compared under."""
_ACTIONS: Final = 600_000
"""Simulated for each start of that comparison, or about."""


@dataclass(frozen=True)
class Placed:
    """A schedule in the placement that it was found for; `layers` of each stage, where they were searched too."""

    v: int
    shape: Shape
    found: Found
    layers: Layers | None = None

    def __str__(self) -> str:
        held = "" if self.layers is None else f", layers {counts_text(self.layers)}"
        return f"{self.v} stage{'s' * (self.v > 1)} a rank in a {self.shape}{held}"


def search_placements(
    p: int,
    m: int,
    costs: Callable[[int, Shape], Cost | None],
    *,
    memory: float | None = None,
    placements: Sequence[tuple[int, Shape]] = PLACEMENTS,
) -> list[Placed]:
    """The quickest schedule in each of these placements for which there are costs, in their order.

    Raises ScheduleError where no schedule in any of them keeps within the memory.
    """
    found, errors = [], []
    for v, shape in placements:
        if (cost := costs(v, shape)) is None:
            continue
        try:
            found.append(Placed(v, shape, search(p, v, m, cost, caps(p, v, memory), shape)))
        except ScheduleError as error:
            errors.append(str(error))
    if not found:
        raise ScheduleError("\n".join(errors) or "there are costs for none of the placements")
    return found


def quickest(placed: Sequence[Placed], *, worth: float = 0.0) -> Placed:
    """The one with the shortest step; more stages on a rank, which come later, must be shorter by so much of it."""
    best = placed[0]
    for each in placed[1:]:
        if each.found.time < best.found.time * (1 - worth * (each.v > best.v)):
            best = each
    return best


def search_layers(
    pieces: Pieces, layers: int, p: int, v: int, m: int, shape: Shape = "loop", memory: float | None = None
) -> Placed:
    """The split of the layers over the stages, and the order, for which a step is shortest; stages may be empty.

    Never longer than with the layers balanced by stage: that split is one of those it starts from. Raises ScheduleError
    where nothing keeps within the memory.
    """
    cap = caps(p, v, memory)

    def found(split: Layers) -> Placed:
        return Placed(v, shape, search(p, v, m, pieces.cost(split), cap, shape), split)

    whole = balanced(layers, p * v, pieces.ends)
    plain = found(whole)
    named = [schedule_for(name, p, m, v) for name in names_in(v, shape)]
    fitting = [s for s in named if all(has <= most for has, most in zip(most_alive(s), cap, strict=True))]
    base = pieces.cost(whole)
    fitting.sort(key=lambda s: step_time(simulate(s, base), base))
    orders = [plain.found.schedule, *fitting[: _ORDERS - 1]]
    splits = splits_for(orders, pieces, layers) if layers else []
    return quickest([plain, *(found(split) for split in dict.fromkeys(splits) if split != plain.layers)])


def layers_under(name: str, pieces: Pieces, layers: int, p: int, v: int, shape: Shape, m: int) -> Placed:
    """The split of the layers over the stages for which a step of the schedule of this name is shortest."""
    s = schedule_for(name, p, m, v)
    split = splits_for([s], pieces, layers)[0]
    cost = pieces.cost(split)
    found = Found(s, name, step_time(simulate(s, cost), cost), lower_bound(p, v, m, cost, shape))
    return Placed(v, shape, found, split)


def splits_for(orders: Sequence[Schedule], pieces: Pieces, layers: int) -> list[Layers]:
    """Splits for which the quickest of these orders, all in one placement, is quick, the best first.

    From layers balanced by stage and from layers balanced by rank they are moved one by one, as long as that makes a
    step shorter. The two splits at the start are among the answers: another order may like them. Where it is known what
    attention takes, halves of layers are moved then: blocks are cut where a step is shorter by more than `WORTH`.
    """
    home = orders[0].placement

    def time(split: Layers) -> float:
        cost = pieces.cost(split)
        return min(step_time(simulate(s, cost), cost) for s in orders)

    known: dict[Layers, float] = {}
    trials = max(30, min(300, _ACTIONS // orders[0].num_actions))

    def climbed(split: Layers, step: float) -> Layers:
        limit = len(known) + trials
        known.setdefault(split, time(split))
        while (better := _better(split, known, time, _moves(split, pieces, home, step), limit)) is not None:
            split = better
        return split

    starts = balanced(layers, len(home), pieces.ends), level(pieces, layers, home)
    ends = [each for start in starts for each in (start, climbed(start, 1))]

    def duration(split: Layers) -> float:
        return round(known[split], 9)

    if pieces.attention is not None:
        best, halves = min(ends, key=duration), balanced(layers, len(home), pieces.ends, pieces.attention)
        cut = min((climbed(start, 0.5) for start in dict.fromkeys([best, *starts, halves])), key=duration)
        ends += [cut] * (known[cut] < known[best] * (1 - WORTH))
    return sorted(ends, key=duration)


def _better(
    split: Layers, known: dict[Layers, float], time: Callable[[Layers], float], moves: Iterator[Layers], limit: int
) -> Layers | None:
    """The first of these moves that makes a step shorter, until so many splits are known."""
    for moved in moves:
        if moved not in known:
            if len(known) >= limit:
                return None
            known[moved] = time(moved)
        if known[moved] < known[split] * (1 - 1e-9):
            return moved
    return None


def level(pieces: Pieces, layers: int, home: Sequence[int]) -> Layers:
    """The same by rank: each layer goes to the rank that has least to do, to the stage there that has fewest."""
    split = [0.0] * len(home)
    busy = _loads(split, pieces, home)
    embedding, head = pieces.ends
    extra = {0: embedding, len(home) - 1: head}
    for _ in range(layers):
        rank = min(range(len(busy)), key=lambda r: (round(busy[r], 9), -r))
        stages = [s for s, holder in enumerate(home) if holder == rank]
        split[min(stages, key=lambda s: (split[s] + extra.get(s, 0.0), s))] += 1
        busy[rank] += 1
    return tuple(split)


def _loads(split: Sequence[float], pieces: Pieces, home: Sequence[int]) -> list[float]:
    """What each rank has to do, in layers: its layers, and the embedding and the head where it holds them."""
    busy = [0.0] * (max(home) + 1)
    for s, load in enumerate(pieces.loads(split)):
        busy[home[s]] += load
    return busy


def _moves(split: Layers, pieces: Pieces, home: Sequence[int], step: float) -> Iterator[Layers]:
    """A layer, or half of one, from a stage to another: from the ranks that have most to do first, to those that have
    least."""
    busy = _loads(split, pieces, home)
    stages = sorted(range(len(split)), key=lambda s: (-busy[home[s]], -split[s]))
    for a in stages:
        for b in reversed(stages):
            if a != b and split[a] >= step:
                moved = list(split)
                moved[a] -= step
                moved[b] += step
                yield tuple(moved)
