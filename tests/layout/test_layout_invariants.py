"""Laws that hold for every layout of up to 64 ranks, in every order of the axes."""

from __future__ import annotations

import sys
from itertools import combinations
from math import prod
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.layout import Layout

sys.path.insert(0, str(Path(__file__).parent))
from strategies import layouts

pytestmark = pytest.mark.pure


@given(layouts())
def test_groups_of_every_axis_partition_the_world(layout: Layout) -> None:
    for axis in layout.axes:
        groups = layout.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world))
        assert all(list(group) == sorted(group) for group in groups)
        if axis != "embed":
            assert {len(group) for group in groups} == {layout.size(axis)}


@given(layouts())
def test_sizes_multiply_in_both_views(layout: Layout) -> None:
    assert prod(layout.size(axis) for axis in ("tp", "cp", "dp", "pp")) == layout.world
    assert prod(layout.size(axis) for axis in ("etp", "ep", "edp", "pp")) == layout.world


@given(layouts())
def test_coordinates_are_a_bijection(layout: Layout) -> None:
    seen = {tuple(layout.coords(rank).items()) for rank in range(layout.world)}
    assert len(seen) == layout.world
    for rank in range(layout.world):
        coords = layout.coords(rank)
        assert layout.rank(**coords) == rank
        assert layout.rank(**{axis: coords[axis] for axis in ("tp", "cp", "dp", "pp")}) == rank
        assert layout.rank(**{axis: coords[axis] for axis in ("etp", "ep", "edp", "pp")}) == rank


@given(layouts(), st.data())
def test_any_two_axes_of_a_view_meet_in_one_rank(layout: Layout, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, layout.world - 1))
    for view in (("tp", "cp", "dp", "pp"), ("etp", "ep", "edp", "pp")):
        for a, b in combinations(view, 2):
            assert set(layout.group(rank, a)) & set(layout.group(rank, b)) == {rank}


@given(layouts(), st.data())
def test_a_group_is_the_ranks_that_agree_on_all_other_axes(layout: Layout, data: st.DataObject) -> None:
    view = data.draw(st.sampled_from([("tp", "cp", "dp", "pp"), ("etp", "ep", "edp", "pp")]))
    axes = data.draw(st.lists(st.sampled_from(view), unique=True, max_size=4))
    rank = data.draw(st.integers(0, layout.world - 1))

    def rest(r: int) -> dict[str, int]:
        return {axis: value for axis, value in layout.coords(r).items() if axis in view and axis not in axes}

    assert layout.group(rank, *axes) == tuple(r for r in range(layout.world) if rest(r) == rest(rank))
    assert layout.group(rank, *axes) in layout.groups(*axes)
    assert len(layout.group(rank, *axes)) == layout.size(*axes)


@given(layouts(), st.data())
def test_both_views_agree_on_the_pipeline(layout: Layout, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, layout.world - 1))
    assert layout.dense.coords(rank)["pp"] == layout.expert.coords(rank)["pp"]
    stage = {r for r in range(layout.world) if layout.coords(r)["pp"] == layout.coords(rank)["pp"]}
    assert set(layout.group(rank, "tp", "cp", "dp")) == set(layout.group(rank, "etp", "ep", "edp")) == stage


@given(layouts(), st.data())
def test_levels_multiply_to_their_axis(layout: Layout, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, layout.world - 1))
    for axis in ("cp", "dp"):
        levels = [name for name in layout.axes if name.startswith(f"{axis}.")]
        if levels:
            assert layout.group(rank, *levels) == layout.group(rank, axis)
            assert prod(layout.size(level) for level in levels) == layout.size(axis)


@given(layouts(), st.data())
def test_embedding_ties_join_the_end_stages(layout: Layout, data: st.DataObject) -> None:
    """Wherever the stages lie: in a v of two, both ends are on one rank, and nothing is to be tied."""
    rank = data.draw(st.integers(0, layout.world - 1))
    last = len(layout.placement) - 1
    ends = tuple(r for r in layout.group(rank, "pp") if {0, last} & set(layout.stages(r)))
    assert layout.group(rank, "embed") == (ends if rank in ends else (rank,))
    assert layout.size("embed") == len(ends)


@given(layouts(), st.data())
def test_every_rank_holds_its_share_of_the_stages(layout: Layout, data: st.DataObject) -> None:
    pipeline = layout.group(data.draw(st.integers(0, layout.world - 1)), "pp")
    held = [stage for rank in pipeline for stage in layout.stages(rank)]
    assert sorted(held) == list(range(layout.size("pp") * layout.vpp))
    assert {len(layout.stages(rank)) for rank in pipeline} == {layout.vpp}


def test_stages_go_in_a_loop_or_to_and_fro() -> None:
    assert Layout.of(pp=4).placement == (0, 1, 2, 3)
    assert Layout.of(pp=4, vpp=2).placement == (0, 1, 2, 3, 0, 1, 2, 3)
    turning = Layout.of(tp=2, pp=4, vpp=2, shape="v")
    assert turning.placement == (0, 1, 2, 3, 3, 2, 1, 0)
    assert turning.stages(5) == (2, 5)
    assert turning.group(0, "embed") == (0,)
    assert Layout.of(pp=4, vpp=3, shape="v").group(0, "embed") == (0, 3)
    assert str(turning) == "tp2-cp1-dp1-pp4, 8 stages in a v"


def test_reads_like_the_table() -> None:
    layout = Layout.of(tp=2, dp=2, pp=2)
    assert layout.groups("tp") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert layout.groups("dp") == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert layout.groups("pp") == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert layout.groups("dp", "cp") == layout.groups("cp", "dp") == layout.groups("dp")
    assert layout.coords(5) == {"tp": 1, "cp": 0, "dp": 0, "pp": 1, "etp": 0, "ep": 0, "edp": 1}
    assert str(layout) == "tp2-cp1-dp2-pp2"


def test_hybrid_sharding_keeps_replicas_in_both_views() -> None:
    layout = Layout.of(tp=2, dp=(4, 2), ep=4, pp=2)
    assert str(layout) == "tp2-cp1-dp.0:4-dp.1:2-pp2 / etp1-ep4-edp.0:2-edp.1:2-pp2"
    assert layout.group(0, "dp.0") == (0, 2, 4, 6)
    assert layout.groups("dp.1") == layout.groups("edp.1")


def test_two_levels_of_context_parallelism() -> None:
    layout = Layout.of(cp=(2, 4))
    assert layout.groups("cp.0") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert layout.groups("cp.1") == [(0, 2, 4, 6), (1, 3, 5, 7)]


def test_dense_and_expert_orders_are_independent() -> None:
    layout = Layout.of(tp=2, dp=4, ep=4, order="tp-dp-pp", expert_order="edp-ep-pp")
    assert layout.group(0, "tp") == (0, 1)
    assert layout.group(0, "ep") == (0, 2, 4, 6)
    assert layout.group(0, "edp") == (0, 1)
