"""Time: closed forms, and what must not change it."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedule_strategies import GENERATED, any_schedule

from stretto.schedule import (
    Action,
    Cost,
    Schedule,
    bubble,
    gpipe,
    lower,
    makespan,
    one_f_one_b,
    peak_live,
    requires,
    simulate,
)

pytestmark = pytest.mark.pure

TIMES = st.floats(0.1, 10)
COSTS = st.builds(Cost, TIMES, TIMES, TIMES, TIMES, st.floats(0, 5))


@given(GENERATED | any_schedule(), COSTS)
def test_spans_keep_every_order(s: Schedule, cost: Cost) -> None:
    """Each rank does one thing at a time, in its order; nothing starts before what it requires."""
    spans = {span.action: span for span in simulate(s, cost)}
    for rank, order in enumerate(s.ranks):
        for earlier, later in pairwise(order):
            assert spans[earlier].end <= spans[later].start
        for a in order:
            assert spans[a].rank == rank
            assert spans[a].end - spans[a].start == pytest.approx(cost.time(a))
            for need in requires(a, s):
                hop = cost.hop if spans[need].rank != rank else 0
                assert spans[need].end + hop <= spans[a].start


@given(GENERATED | any_schedule(), COSTS)
def test_nothing_waits_without_a_reason(s: Schedule, cost: Cost) -> None:
    spans = {span.action: span for span in simulate(s, cost)}
    for order in s.ranks:
        for earlier, a in zip((None, *order), order, strict=False):
            free = [spans[earlier].end] if earlier else []
            hops = [(spans[n], cost.hop if spans[n].rank != spans[a].rank else 0) for n in requires(a, s)]
            assert spans[a].start == max([0, *free, *(need.end + hop for need, hop in hops)])


@given(GENERATED | any_schedule(), COSTS)
def test_spans_come_in_an_order_that_can_happen(s: Schedule, cost: Cost) -> None:
    done: set[Action] = set()
    for span in simulate(s, cost):
        assert set(requires(span.action, s)) <= done
        done.add(span.action)


@given(st.integers(1, 8), st.integers(1, 12), TIMES, TIMES, st.floats(0, 5))
def test_gpipe_takes_the_time_of_its_diagonal(p: int, m: int, forward: float, backward: float, hop: float) -> None:
    spans = simulate(gpipe(p, m), Cost(forward, backward, hop=hop))
    assert makespan(spans) == pytest.approx((m + p - 1) * (forward + backward) + 2 * (p - 1) * hop)


@given(GENERATED | any_schedule(), COSTS)
def test_lowering_does_not_change_time(s: Schedule, cost: Cost) -> None:
    """Receives are posted early and sends do not wait, so order alone decides."""
    program = lower(s, cost=cost)
    times = {span.action: span.start for span in simulate(program, cost)}
    assert all(times[span.action] == pytest.approx(span.start) for span in simulate(s, cost))


def test_the_slowest_stage_sets_the_pace() -> None:
    m = 100
    spans = simulate(one_f_one_b(4, m), Cost(stages=(1, 1, 2, 1)))
    assert makespan(spans) == pytest.approx(m * 6, rel=0.03)
    assert bubble(spans) == pytest.approx(1 - 5 / 8, abs=0.02)


def test_split_backwards_hold_activations_until_w() -> None:
    s = Schedule.parse("0F0 0I0 0F1 0I1 0W0 0W1")
    assert peak_live(simulate(s)) == (2,)
    assert makespan(simulate(s, Cost(1, 7, 2, 4))) == 14
