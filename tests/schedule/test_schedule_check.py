"""Break a schedule in every way; `check` must name what was broken."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedule_strategies import GENERATED, any_schedule

from stretto.schedule import Action, DeadlockError, Op, Schedule, ScheduleError, check, gpipe, one_f_one_b, schedule_for

pytestmark = pytest.mark.pure

VALID = GENERATED | any_schedule()


def actions(text: str) -> tuple[Action, ...]:
    return tuple(map(Action.parse, text.split()))


def edited(s: Schedule, rank: int, order: list[Action]) -> Schedule:
    return replace(s, ranks=(*s.ranks[:rank], tuple(order), *s.ranks[rank + 1 :]))


def position(data: st.DataObject, s: Schedule) -> tuple[int, int]:
    rank = data.draw(st.integers(0, s.num_ranks - 1))
    return rank, data.draw(st.integers(0, len(s.ranks[rank]) - 1))


@given(VALID)
def test_what_can_happen_passes(s: Schedule) -> None:
    check(s)


@given(VALID, st.data())
def test_an_action_dropped_is_named(s: Schedule, data: st.DataObject) -> None:
    rank, at = position(data, s)
    order = [*s.ranks[rank]]
    gone = order.pop(at)
    with pytest.raises(ScheduleError, match=rf"(?m)^{gone} is missing"):
        check(edited(s, rank, order))


@given(VALID, st.data())
def test_an_action_repeated_is_named(s: Schedule, data: st.DataObject) -> None:
    rank, at = position(data, s)
    _, to = position(data, s)
    order = [*s.ranks[rank]]
    order.insert(to, order[at])
    with pytest.raises(ScheduleError, match=f"{s.ranks[rank][at]} is there 2 times"):
        check(edited(s, rank, order))


@given(VALID.filter(lambda s: s.num_ranks > 1), st.data())
def test_an_action_on_the_wrong_rank_is_named(s: Schedule, data: st.DataObject) -> None:
    rank, at = position(data, s)
    other = (rank + 1) % s.num_ranks
    order = [*s.ranks[rank]]
    astray = order.pop(at)
    wrong = edited(edited(s, rank, order), other, [astray, *s.ranks[other]])
    with pytest.raises(ScheduleError, match=f"{astray} on rank {other}: stage {astray.stage} lies on rank {rank}"):
        check(wrong)


@given(VALID, st.data())
def test_a_backward_before_its_forward_is_named(s: Schedule, data: st.DataObject) -> None:
    rank, at = position(data, s)
    order = [*s.ranks[rank]]
    forward = Action(order[at].stage, Op.F, order[at].mb)
    backward = next(a for a in order if a.op in (Op.B, Op.I) and (a.stage, a.mb) == (forward.stage, forward.mb))
    i, j = order.index(forward), order.index(backward)
    order[i], order[j] = order[j], order[i]
    with pytest.raises(DeadlockError) as caught:
        check(edited(s, rank, order))
    assert backward in caught.value.blocked
    assert re.search(rf"\b{backward} waits for .*\b{forward}\b", str(caught.value))


@given(st.builds(schedule_for, st.sampled_from(["1f1b", "gpipe"]), st.integers(2, 6), st.integers(2, 10)), st.data())
def test_every_swap_is_harmless_or_names_where_ranks_stand(s: Schedule, data: st.DataObject) -> None:
    """Whether a swap is harmless is decided here from all orders at once: is the dependency graph a cycle?"""
    rank, i = position(data, s)
    j = data.draw(st.integers(0, len(s.ranks[rank]) - 1))
    order = [*s.ranks[rank]]
    order[i], order[j] = order[j], order[i]
    swapped = edited(s, rank, order)
    if has_cycle(swapped):
        with pytest.raises(DeadlockError, match="deadlock: "):
            check(swapped)
    else:
        check(swapped)


def has_cycle(s: Schedule) -> bool:
    """By taking away whatever points at nothing, until nothing can be taken away."""
    before: dict[Action, set[Action]] = {}
    for stage, order in enumerate(s.ranks):
        for earlier, a in zip((None, *order), order, strict=False):
            before[a] = {earlier} if earlier else set()
            if a.op is Op.F and stage > 0:
                before[a].add(Action(stage - 1, Op.F, a.mb))
            if a.op is Op.B:
                before[a].add(Action(stage, Op.F, a.mb))
                if stage + 1 < s.num_stages:
                    before[a].add(Action(stage + 1, Op.B, a.mb))
    while free := {a for a, needs in before.items() if not needs & before.keys()}:
        before = {a: needs for a, needs in before.items() if a not in free}
    return bool(before)


def test_a_deadlock_says_who_waits_for_what() -> None:
    crossed = Schedule.parse("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1")
    with pytest.raises(DeadlockError) as caught:
        check(crossed)
    assert str(caught.value) == "deadlock: 0B0 waits for 1B0; 1F1 waits for 0F1"
    assert caught.value.blocked == (Action.parse("0B0"), Action.parse("1F1"))


def test_all_violations_are_listed_at_once() -> None:
    wrong = Schedule((0, 1), 2, (actions("0F0 0B0 0B0 0W0 0F2"), actions("1F0 1I0 1F1 1B1 1W1 3F0")))
    with pytest.raises(ScheduleError) as caught:
        check(wrong)
    assert str(caught.value).splitlines() == [
        "8 violations:",
        "0F2 on rank 0: there is no microbatch 2 of 2",
        "3F0 on rank 1: there is no stage 3 of 2",
        "0B0 is there 2 times",
        "0B0 is a whole backward, but there is 0W0 as well",
        "0F1 is missing",
        "0B1 is missing (or 0I1 and 0W1)",
        "1W0 is missing, the other half of 1I0",
        "1B1 is a whole backward, but there is 1W1 as well",
    ]


def test_a_schedule_has_no_messages() -> None:
    with pytest.raises(ScheduleError, match="0SEND_F0 on rank 0: only a lowered program has SEND_F"):
        check(Schedule((0,), 1, (actions("0F0 0SEND_F0 0B0"),)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (replace(gpipe(2, 1), placement=(0, 2)), "stage 1 lies on rank 2, there are 2 ranks"),
        (replace(gpipe(2, 1), placement=(0, 0)), "rank 1 holds no stage"),
        (replace(one_f_one_b(1, 1), num_microbatches=0), "0 microbatches: there must be at least 1"),
        (Schedule((), 1, ()), "0 ranks: there must be at least 1"),
    ],
)
def test_a_placement_that_is_none(wrong: Schedule, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        check(wrong)
