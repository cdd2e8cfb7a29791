"""The state of any rank of any layout, without its peers."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from stretto.layout import Layout
from stretto.parallel_state import ParallelState, default_axes, plan

pytestmark = pytest.mark.gloo


def test_a_middle_rank_seen_from_here() -> None:
    layout = Layout.of(tp=2, dp=2, pp=4)
    with ParallelState.inspect(layout, 5) as state:
        assert state.coords["pp"] == 1
        assert state.axis("pp").ranks == (1, 5, 9, 13)
        assert state.axis("pp").rank == 1
        assert state.axis("embed").group is None
        x = torch.ones(3)
        dist.all_reduce(x, group=state.axis("tp").group)
    assert not dist.is_initialized()


def test_two_layouts_seen_at_once() -> None:
    with ParallelState.inspect(Layout.of(tp=4), 1) as a, ParallelState.inspect(Layout.of(dp=4), 1) as b:
        assert a.axis("tp").size == b.axis("dp").size == 4
        assert a.axis("dp").size == b.axis("tp").size == 1


def test_equal_sets_of_ranks_share_a_group() -> None:
    state = ParallelState.inspect(Layout.of(dp=4, pp=2), 0)
    assert state.axis("dp").group is state.axis("dp", "cp").group
    assert state.axis("pp").group is state.axis("embed").group is state.axis("tp", "pp").group


def test_a_combination_that_was_not_declared_says_how_to_get_it() -> None:
    state = ParallelState.inspect(Layout.of(tp=2, dp=2), 0)
    with pytest.raises(LookupError, match=r"tp-dp; this state has tp, dp, .*axes=\(\*default_axes.*'tp', 'dp'"):
        state.axis("tp", "dp")
    with pytest.raises(ValueError, match="unknown axis 'vp'"):
        state.axis("vp:up")
    with pytest.raises(LookupError, match="no group was declared for tp:up"):
        state.axis("tp:up")
    state.close()
    with pytest.raises(LookupError, match="it is closed"):
        state.axis("tp")


@pytest.mark.parametrize(
    "layout", [Layout.of(tp=8, cp=4, dp=(32, 8), pp=16, ep=64), Layout.of(tp=8, dp=3072, pp=4)], ids=str
)
def test_a_large_state_stands_in_under_a_second(layout: Layout) -> None:
    """131,072 and 98,304 ranks; 40 ms of this thread; creating every group of the job takes many seconds."""
    start = time.thread_time()
    state = ParallelState.inspect(layout, layout.world // 3)
    elapsed = time.thread_time() - start
    groups = {id(axis.group) for axis in state if axis.group is not None}
    assert len(groups) <= 20
    assert elapsed < 1.0, f"{elapsed:.3f} s"


def test_the_plan_of_one_rank_does_not_grow_with_the_world() -> None:
    layout = Layout.of(tp=8, dp=3072, pp=4)
    assert layout.world == 98_304
    plan(layout, 0, default_axes(layout))
    start = time.thread_time()
    plan(layout, 50_000, default_axes(layout))
    assert time.thread_time() - start < 0.050 * 4  # of this thread: others may have the cores
