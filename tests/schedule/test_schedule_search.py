"""The searched schedule: never worse than the best by name, within its memory, and how far from the best there is."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.schedule import (
    GENERATORS,
    Cost,
    Schedule,
    ScheduleError,
    check,
    check_lowered,
    lower,
    peak_live,
    schedule_for,
    simulate,
    step_time,
)
from stretto.schedule.greedy import squeeze
from stretto.schedule.search import lower_bound, search, split

search_module = sys.modules["stretto.schedule.search"]

pytestmark = pytest.mark.pure

STAGES = st.sampled_from([(1, "loop"), (2, "loop"), (2, "v"), (3, "loop")])
SHARE = st.sampled_from([0.5, 0.75, 1.0, 1.3])


@given(
    st.integers(1, 6),
    st.integers(1, 12),
    st.sampled_from([(1, "loop"), (2, "loop"), (2, "v"), (3, "loop")]),
    SHARE,
    SHARE,
    SHARE,
    SHARE,
)
def test_never_worse_than_the_best_by_name(
    p: int, m: int, stages: tuple[int, str], i: float, w: float, head: float, memory: float
) -> None:
    """Catches a cap that is not kept, a candidate that is lost, a bound that is none."""
    v, shape = stages
    first = (1.0,) * (p * v - 1)
    cost = Cost.split((*first, 1 + head), (*(i * x for x in first), i + head), (*(w * x for x in first), w), hop=0.1)
    cap = [max(v, round(memory * p * v))] * p
    named = {}
    for name, made in GENERATORS.items():
        if (made.any_stages or made.stages == v) and (v == 1 or made.shape == shape) and name != "auto":
            timeline = simulate(schedule_for(name, p, m, v), cost)
            if max(peak_live(timeline)) <= cap[0]:
                named[name] = step_time(timeline, cost)
    try:
        found = search(p, v, m, cost, cap, shape)  # type: ignore[arg-type]
    except ScheduleError:
        assert not named
        return
    check(found.schedule)
    check_lowered(lower(found.schedule))
    assert max(peak_live(simulate(found.schedule, cost))) <= cap[0]
    assert found.time == pytest.approx(step_time(simulate(found.schedule, cost), cost))
    assert found.time <= min(named.values(), default=float("inf")) + 1e-9
    assert found.bound <= found.time + 1e-9


def test_a_step_is_close_to_the_bound_where_the_head_is_heavy() -> None:
    """8 ranks in a V, W of 0.65 of a forward, a head of 1.3 layers: 83.1 for zbv as it is."""
    cost = Cost.split((0.5,) * 15 + (0.68,), (0.52,) * 15 + (0.7,), (0.33,) * 15 + (0.45,), hop=0.02, finish=0.3)
    found = search(8, 2, 24, cost, [16] * 8, "v")
    assert found.gap < 0.03
    assert found.time < 0.96 * step_time(simulate(schedule_for("zbv", 8, 24), cost), cost)


def test_a_search_reorders_so_many_actions_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: every start reordered, whatever it takes; the best by name forgotten. A number, not seconds: all ranks
    must find the same schedule."""
    calls = list[int]()
    squeezed = search_module.squeeze

    def counted(s: Schedule, *more: Any) -> Schedule:
        calls.append(s.num_actions)
        return squeezed(s, *more)

    monkeypatch.setattr(search_module, "squeeze", counted)
    cost = Cost.split((1.0, 2.0, 1.0, 1.0), (2.0, 1.0, 1.0, 2.0), (0.7, 0.7, 0.7, 1.0), hop=0.3)
    free = search(4, 1, 16, cost, [4] * 4)
    every, calls[:] = len(calls), []
    monkeypatch.setattr(search_module, "REORDERED", 300)
    found = search(4, 1, 16, cost, [4] * 4)
    assert sum(calls) <= 300 + 4 * 16 * 3
    assert len(calls) < every
    named = (schedule_for(name, 4, 16) for name in ("1f1b", "zb-h1"))
    assert free.time <= found.time <= min(step_time(simulate(s, cost), cost) for s in named)


def test_a_cap_below_all_is_an_error() -> None:
    with pytest.raises(ScheduleError, match="keeps within 1 activations of a stage; the least that one holds is 4"):
        search(4, 2, 8, Cost(), [1] * 4, "v")


def test_squeezing_keeps_the_caps_or_says_that_it_cannot() -> None:
    with pytest.raises(ScheduleError, match=r"actions find no place under the caps \[1, 1\]"):
        squeeze(split(schedule_for("interleaved", 2, 4, 2)), cap=[1, 1])


def test_auto_is_the_search_for_these_costs() -> None:
    cost = Cost.split(1.0, 1.0, 0.5, hop=0.2)
    assert schedule_for("auto", 4, 8, cost=cost) == search(4, 2, 8, cost, [8] * 4, "v").schedule


@pytest.mark.parametrize("memory", [2, 3, 4])
def test_the_solver_proves_what_is_best(memory: int) -> None:
    """On three ranks in a V the search is at the optimum but for one forward, which the solver finds and proves."""
    pytest.importorskip("ortools")
    from stretto.schedule.exact import solve

    cap = [2 * memory] * 3
    known = search(3, 2, 3, Cost(), cap, "v")
    best = solve(3, 2, 3, Cost(), cap, "v", seconds=20)
    check(best.schedule)
    assert max(peak_live(simulate(best.schedule))) <= cap[0]
    assert lower_bound(3, 2, 3, Cost(), "v") <= best.bound <= best.time * (1 + 1e-9) <= known.time * (1 + 2e-9)
    assert best.gap == pytest.approx(0, abs=1e-6)


def test_a_proof_is_not_rounded_up() -> None:
    """Catches costs that the solver rounds to the nearest of its ticks: its bound was above what a step takes."""
    pytest.importorskip("ortools")
    from stretto.schedule.exact import solve

    cost = Cost.split(1.0, 0.00156, 0.00156)
    best = solve(1, 1, 4, cost, [4], seconds=20)
    assert best.time == pytest.approx(4 * 1.00312)
    assert best.bound <= best.time * (1 + 1e-9)
    assert best.gap < 1e-3
