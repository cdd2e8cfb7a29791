"""Placements and splits of layers: never worse than any schedule by name, nor than layers balanced by stage.

Each test names the fault that it catches.
"""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.layout.stages import placement
from stretto.schedule import (
    Cost,
    ScheduleError,
    check,
    check_lowered,
    lower,
    peak_live,
    schedule_for,
    simulate,
    step_time,
)
from stretto.schedule.measured import cost_text
from stretto.schedule.partition import balanced
from stretto.schedule.pieces import Pieces, cost_for, pieces_in
from stretto.schedule.placements import (
    PLACEMENTS,
    layers_under,
    level,
    quickest,
    search_layers,
    search_placements,
)
from stretto.schedule.search import caps, names_in

pytestmark = pytest.mark.pure

TIME = st.floats(0.2, 3.0)
EVERY = [(v, shape) for v in (1, 2, 3, 4) for shape in ("loop", "v") if names_in(v, shape) and (v, shape) != (1, "v")]
"""Where schedules by name have their stages."""


def named(p: int, m: int, memory: float | None, costs: dict[tuple[int, str], Cost]) -> list[float]:
    """Step times of all schedules by name, in all placements, that keep within the memory."""
    found = []
    for (v, shape), cost in costs.items():
        cap = caps(p, v, memory)
        for name in names_in(v, shape):  # type: ignore[arg-type]
            timeline = simulate(schedule_for(name, p, m, v), cost)
            if all(has <= most for has, most in zip(peak_live(timeline), cap, strict=True)):
                found.append(step_time(timeline, cost))
    return found


@given(st.data())
@settings(max_examples=settings.default.max_examples // 2)
def test_no_schedule_by_name_is_quicker_in_any_placement(data: st.DataObject) -> None:
    """For costs of every stage drawn at random. Catches a placement that is left out, a cap of another placement, a
    cost of another placement, and the slowest taken for the quickest."""
    p, m = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 32))
    memory = data.draw(st.sampled_from([None, 0.5 * p, 2.0 * p, float(m)]))
    hop = data.draw(st.sampled_from([0.0, 0.1]))
    costs = {}
    for v, shape in EVERY:
        draws = data.draw(st.lists(st.tuples(TIME, TIME, TIME), min_size=p * v, max_size=p * v))
        f, i, w = (tuple(x / v for x in column) for column in zip(*draws, strict=True))
        costs[v, shape] = Cost.split(f, i, w, hop=hop)
    by_name = named(p, m, memory, costs)
    try:
        every = search_placements(p, m, lambda v, shape: costs[v, shape], memory=memory)
    except ScheduleError:
        assert not by_name
        return
    best = quickest(every)
    check(best.found.schedule)
    check_lowered(lower(best.found.schedule))
    assert best.found.schedule.placement == placement(p, best.v, best.shape)
    timeline = simulate(best.found.schedule, costs[best.v, best.shape])
    assert best.found.time == step_time(timeline)
    assert max(peak_live(timeline)) <= caps(p, best.v, memory)[0]
    assert best.found.time <= min(by_name, default=float("inf")) + 1e-9


def test_more_stages_on_a_rank_must_be_worth_it() -> None:
    """Catches a margin that also holds between placements of as many stages, or that favours more of them."""
    every = search_placements(4, 8, lambda v, _: Cost.split(1 / v, 1 / v, 0.7 / v, hop=0.01))
    times = {(each.v, each.shape): each.found.time for each in every}
    assert set(times) == set(EVERY)
    assert times[4, "loop"] < times[1, "loop"] * 0.98
    assert quickest(every).found.time == min(times.values())
    assert quickest(every, worth=0.5).v == 1
    assert quickest([e for e in every if e.v == 2], worth=0.5).found.time == min(times[2, "v"], times[2, "loop"])


@given(
    st.integers(1, 4),
    st.sampled_from(PLACEMENTS),
    st.integers(1, 8),
    st.integers(0, 12),
    st.sampled_from([0.0, 0.6, 2.3, 4.0]),
    st.sampled_from([0.0, 0.4]),
)
def test_a_searched_split_is_never_slower_than_a_balanced_one(
    p: int, place: tuple[int, str], m: int, layers: int, head: float, embedding: float
) -> None:
    """Catches a layer that is lost or there twice, a split that is not that of the times."""
    v, shape = place
    pieces = Pieces((1.0, 1.1, 0.8), (embedding, 0.0, embedding), (3 * head, 0.0, 0.0), hop=0.05)
    plain = balanced(layers, p * v, pieces.ends)
    try:
        known = search_placements(p, m, lambda *_: pieces.cost(plain), placements=[place])[0]  # type: ignore[list-item]
    except ScheduleError:
        return
    best = search_layers(pieces, layers, p, v, m, shape)  # type: ignore[arg-type]
    assert best.layers is not None
    assert len(best.layers) == p * v
    assert sum(best.layers) == layers
    cost = pieces.cost(best.layers)
    assert best.found.time == step_time(simulate(best.found.schedule, cost), cost)
    assert best.found.time <= known.found.time + 1e-9
    assert sum(level(pieces, layers, placement(p, v, shape))) == layers  # type: ignore[arg-type]


def test_where_the_head_is_heavy_a_stage_stays_empty() -> None:
    """Eight layers on two ranks in a V, a head of 2.3: the rank of the head has five of 7.3, for 147 balanced by
    stage. Catches a split by stages alone, where the rank of the head has its first stage as well."""
    pieces = Pieces((1.0, 1.15, 0.85), head=(6.9, 0.0, 0.0), hop=0.02)
    best = search_layers(pieces, 8, 2, 2, 8, "v")
    plain = search_placements(2, 8, lambda *_: pieces.cost(balanced(8, 4, pieces.ends)), placements=[(2, "v")])[0]
    assert best.layers is not None
    assert best.layers[0] + best.layers[3] == 3
    assert best.found.time < 0.9 * plain.found.time
    assert best.found.gap < 0.01


def test_layers_balanced_by_rank_are_a_start_too() -> None:
    """From layers balanced by stage alone, one at a time, no way leads to the best: 130 instead of 122."""
    best = search_layers(Pieces((1.0, 1.0, 1.0), head=(12.0, 0.0, 0.0)), 12, 4, 2, 8, "v")
    assert best.found.time == pytest.approx(122)


def test_the_split_under_one_schedule_is_the_best_there_is() -> None:
    """Six layers on three ranks: against every split. Catches moves that stop early, and another schedule's time."""
    pieces = Pieces((1.0, 1.0, 1.0), head=(4.0, 0.0, 0.0))
    best = layers_under("1f1b", pieces, 6, 3, 1, "loop", 6)
    times = {
        split: step_time(simulate(schedule_for("1f1b", 3, 6), pieces.cost(split)))
        for split in product(range(7), repeat=3)
        if sum(split) == 6
    }
    assert best.found.time == min(times.values())


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(any),
    st.tuples(TIME, TIME, TIME),
    st.tuples(TIME, TIME, TIME),
    st.tuples(TIME, TIME, TIME),
)
def test_pieces_explain_the_costs_they_were_found_in(
    layers: list[int],
    layer: tuple[float, float, float],
    first: tuple[float, float, float],
    last: tuple[float, float, float],
) -> None:
    """Catches an embedding that counts as layers where middle stages have some, and costs that change on the way."""
    pieces = Pieces(layer, first, last, hop=0.25)
    cost = pieces.cost(layers)
    found = Pieces.of(cost, layers)
    again = found.cost(layers)
    assert again.hop == 0.25
    for a, b in zip(again._columns, cost._columns, strict=True):
        assert a == pytest.approx(b)
    if sum(layers[1:-1]):
        assert found.layer == pytest.approx(layer)
        assert found.embedding == pytest.approx(first)
        assert found.head == pytest.approx(last)


def test_a_file_gives_costs_of_any_split() -> None:
    pieces = Pieces((1.0, 1.0, 0.5), (0.1, 0.0, 0.1), (3.0, 0.0, 0.0))
    text = cost_text(pieces.cost((2, 2, 2, 2)), (2, 2, 2, 2))
    assert cost_for(text, "x", (2, 2, 2, 2)) == pieces.cost((2, 2, 2, 2))
    assert cost_for(text, "x", (5, 3)).forward == pytest.approx((5.1, 6.0))
    plain = cost_text(pieces.cost((4, 4)))
    assert cost_for(plain, "x", (5, 3)) == pieces.cost((4, 4))  # as before: it says nothing of layers
    with pytest.raises(ValueError, match="costs of 2 stages, but there are 4"):
        cost_for(plain, "x", (2, 2, 2, 2))
    with pytest.raises(ValueError, match="does not say how many layers"):
        pieces_in(plain, "x")
    with pytest.raises(ValueError, match="do not say what a layer takes"):
        Pieces.of(Cost.split(1.0, 1.0, 1.0), (0, 0))
