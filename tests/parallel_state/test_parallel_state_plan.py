"""The list of groups of every rank: small, in one order, and without a circle of ranks that wait."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.layout import Layout
from stretto.parallel_state import GroupOptions, default_axes, plan
from stretto.parallel_state.plan import neighbours

pytestmark = pytest.mark.gloo  # no processes, but the package imports torch


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    tp, cp, pp = (draw(st.integers(1, 4)) for _ in range(3))
    inner, outer = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    ep = draw(st.sampled_from(divisors(tp * cp * inner)))
    return Layout.of(tp=tp, cp=cp, dp=(inner, outer), pp=pp, ep=ep)


@given(layouts(), st.randoms(use_true_random=False))
def test_no_order_of_arrival_can_deadlock(layout: Layout, random: st.DrawFn) -> None:
    """Each rank stands at one group until all its members stand there; all must come through."""
    axes = list(default_axes(layout))
    random.shuffle(axes)  # type: ignore[attr-defined]  # any declared order must do
    left = {rank: list(plan(layout, rank, axes)) for rank in range(layout.world)}
    while any(left.values()):
        ready = {
            planned
            for waiting in left.values()
            if waiting
            for planned in waiting[:1]
            if all(left[member] and left[member][0] == planned for member in planned.ranks)
        }
        assert ready, {rank: list(map(str, waiting)) for rank, waiting in left.items()}
        for planned in ready:
            for member in planned.ranks:
                del left[member][0]


@given(layouts(), st.data())
def test_a_rank_is_in_few_groups_each_set_of_ranks_once(layout: Layout, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, layout.world - 1))
    planned = plan(layout, rank, default_axes(layout))
    assert len(planned) <= 22
    plain = [each.ranks for each in planned if ":" not in str(each)]
    assert len(set(plain)) == len(plain)
    assert all(len(each.ranks) > 1 and rank in each.ranks for each in planned)


@given(layouts(), st.data())
def test_names_are_unlike(layout: Layout, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, layout.world - 1))
    names = [str(each) for each in plan(layout, rank, default_axes(layout))]
    assert len(set(names)) == len(names)


def test_reads_like_a_list() -> None:
    layout = Layout.of(tp=2, dp=2, pp=2)
    assert [str(each) for each in plan(layout, 5, default_axes(layout))] == [
        "tp[4-5]",
        "dp[5,7]",
        "pp[1,5]",
        "pp:1>0[1,5]",
        "tp-pp[0-1,4-5]",
        "pp-dp-cp[1,3,5,7]",
        "tp-cp-dp-pp[0-7]",
    ]
    assert plan(layout, 5, default_axes(layout))[1].axes == (("dp",), ("dp", "cp"))


def test_a_channel_shares_its_group_with_no_other() -> None:
    """Else a gradient on its way up would wait behind what the collectives of the same ranks wait for."""
    (down, up) = plan(Layout.of(pp=2), 0, default_axes(Layout.of(pp=2)))
    assert down.ranks == up.ranks == (0, 1)
    assert up.axes == (("pp:1>0",),)
    assert {("pp",), ("pp:0>1",), ("embed",), ("tp", "pp")} < set(down.axes)


@pytest.mark.parametrize("pp", [2, 3, 4, 8])
def test_neighbours_of_a_pipeline_have_a_group_for_each_direction(pp: int) -> None:
    """Of two ranks, and as few as there are neighbours. Catches: one group of all, on which a rank's message to one
    neighbour waits for that from the other."""
    layout = Layout.of(tp=2, pp=pp)
    for rank in range(layout.world):
        planned = plan(layout, rank, default_axes(layout))
        carries = {name: each for each in planned for (name, *_) in each.axes if ">" in name}
        place = layout.coords(rank)["pp"]
        near = [other for other in (place - 1, place + 1) if 0 <= other < pp]
        assert set(carries) == {f"pp:{a}>{b}" for other in near for a, b in ((place, other), (other, place))}
        for name, group in carries.items():
            ends = sorted(int(end) for end in name.removeprefix("pp:").split(">"))
            assert group.ranks == tuple(layout.group(rank, "pp")[end] for end in ends)
        assert len({id(group) for group in carries.values()}) == len(carries)
    assert len(neighbours(pp, ring=True)) == (2 * pp if pp > 2 else 2)


def test_places_that_are_not_there_are_an_error() -> None:
    with pytest.raises(ValueError, match="pp:1>2 names places of an axis of 2 ranks"):
        plan(Layout.of(pp=2), 0, (("pp:1>2",),))


def test_other_options_make_another_group() -> None:
    layout = Layout.of(dp=4)
    apart = plan(layout, 0, (("dp",), ("dp", "cp")), {frozenset(("dp", "cp")): GroupOptions(high_priority=True)})
    assert [each.axes for each in apart] == [(("dp",),), (("dp", "cp"),)]
