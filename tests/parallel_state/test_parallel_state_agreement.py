"""Ranks that do not want the same groups are told so, all of them, within seconds."""

from __future__ import annotations

import pickle
import time

import pytest
import torch
import torch.distributed as dist

from stretto.layout import Layout
from stretto.parallel_state import GroupCost, GroupOptions, ParallelState, costs_line, default_axes
from stretto.testing import Pool
from stretto.world import World

pytestmark = pytest.mark.gloo


def complaint(world: World, odd: dict[int, str]) -> tuple[str, float]:
    """What a rank is told, and after how many seconds, when some ranks want something else."""
    layout, axes, options = Layout.of(tp=2, dp=2), default_axes(Layout.of(tp=2, dp=2)), {}
    match odd.get(world.rank):
        case "sizes":
            layout = Layout.of(tp=4)
        case "order":
            axes = (axes[1], axes[0], *axes[2:])
        case "list":
            axes = axes[:-1]
        case "options":
            options = {"tp": GroupOptions(timeout=5)}
    start = time.monotonic()
    try:
        with ParallelState.build(layout, world, timeout=3, axes=axes, options=options):
            return "", time.monotonic() - start
    except RuntimeError as error:
        return str(error), time.monotonic() - start


@pytest.mark.parametrize("fault", ["sizes", "order", "list", "options"])
def test_one_rank_with_another_list_is_named_on_all_ranks(pool: Pool, fault: str) -> None:
    for message, seconds in pool.run(4, complaint, {2: fault}):
        assert "the ranks do not agree" in message
        assert "ranks 0-1, 3: tp2-cp1-dp2-pp1" in message
        assert "\n  rank 2: tp" in message
        assert seconds < 5


def absent(world: World) -> tuple[str, float]:
    """The same, when rank 1 comes late."""
    if world.rank == 1:
        time.sleep(2)
    start = time.monotonic()
    try:
        ParallelState.build(Layout.of(dp=3), world, timeout=1)
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    return "", 0.0


def test_a_rank_that_does_not_come_is_named(pool: Pool) -> None:
    for message, seconds in pool.run(3, absent):
        assert "rank 1 of 3 did not come to build the process groups within 1 s" in message
        assert seconds < 5


def again_after_a_complaint(world: World) -> None:
    message, _ = complaint(world, {1: "sizes"})
    assert message
    with ParallelState.build(Layout.of(tp=2, dp=2), world, timeout=20) as state:
        dist.barrier(group=state.axis("tp").group)


def test_a_rejected_build_does_not_spoil_the_next(pool: Pool) -> None:
    pool.run(4, again_after_a_complaint)


def test_a_layout_of_another_size_is_rejected_before_anyone_is_asked() -> None:
    with pytest.raises(ValueError, match="tp2-cp1-dp1-pp1 has 2 ranks, the world has 1: start 2 processes"):
        ParallelState.build(Layout.of(tp=2), World.single())


def test_options_for_an_undeclared_axis_are_rejected() -> None:
    with pytest.raises(ValueError, match="options for dp-tp, which is none of the axes: tp, dp"):
        ParallelState.build(Layout.of(), World.single(), options={"tp-dp": GroupOptions()})


def rejected(world: World) -> list[str]:
    """What a CPU world says to options that it could only ignore, or could not follow."""
    found = []
    for options in (
        GroupOptions(max_ctas=4, cpu=True, peer_buffer=8),
        GroupOptions(backend="nccl"),
        GroupOptions(backend="mpi"),
    ):  # type: ignore[arg-type]
        with pytest.raises(ValueError) as error:  # noqa: PT011  # the caller looks at the words
            ParallelState.build(Layout.of(tp=2), world, options={"tp": options})
        found.append(str(error.value))
    return found


def test_options_without_effect_are_rejected(pool: Pool) -> None:
    no_effect, no_nccl, unknown = pool.run(2, rejected)[1]
    assert "tp: max_ctas, cpu, peer_buffer would have no effect on gloo; leave it out, or use nccl" in no_effect
    assert "tp: backend='nccl' for tensors on cpu; choose 'gloo', or 'nccl' on cuda" in no_nccl
    assert "backend='mpi'" in unknown


def priced(world: World) -> list[tuple[str, int, bool]]:
    with ParallelState.build(Layout.of(tp=2, pp=2), world, timeout=20) as state:
        assert all(cost.milliseconds > 0 for cost in state.costs)
        return [(cost.name, cost.size, cost.megabytes is not None) for cost in state.costs]


def test_every_group_has_a_name_and_a_price(pool: Pool) -> None:
    assert pool.run(4, priced)[1] == [
        ("tp[0-1]", 2, True),
        ("pp[1,3]", 2, True),
        ("pp:1>0[1,3]", 2, True),
        ("tp-pp[0-3]", 4, True),
    ]


def test_prices_read_like_a_list() -> None:
    costs = [GroupCost("tp[0-1]", 2, 6.1, 4.75), GroupCost("pp[0,4]", 2, 44.2, 0.06)]
    assert costs_line(costs) == "groups 50 ms, 4.8 MB: tp[0-1] 6 ms, 4.8 MB; pp[0,4] 44 ms, 0.1 MB"
    assert costs_line([GroupCost("tp[0-1]", 2, 6.1, None)]) == "groups 6 ms: tp[0-1] 6 ms"
    assert costs_line([]) == "groups none: this rank is alone on every axis"


def flight_recording(world: World) -> set[str]:
    with ParallelState.build(Layout.of(tp=2, pp=2), world, timeout=20):
        recorded = pickle.loads(torch._C._distributed_c10d._dump_fr_trace())
        return {entry["process_group"][1] for entry in recorded["entries"]}


def test_flight_recordings_name_a_group_after_its_axis_and_ranks(pool: Pool) -> None:
    assert {"tp[2-3]", "pp[1,3]", "pp:1>0[1,3]", "tp-pp[0-3]"} <= pool.run(4, flight_recording)[3]


def own_timeouts(world: World) -> tuple[float, float]:
    with ParallelState.build(
        Layout.of(tp=2, dp=2), world, timeout=20, options={"tp": GroupOptions(timeout=7)}
    ) as state:
        return tuple(
            state.axis(name).group._get_backend(world.device).options._timeout.total_seconds() for name in ("tp", "dp")
        )


def test_an_axis_may_have_a_time_out_of_its_own(pool: Pool) -> None:
    assert pool.run(4, own_timeouts) == [(7.0, 20.0)] * 4
