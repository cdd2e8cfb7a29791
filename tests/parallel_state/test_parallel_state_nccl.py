"""The same groups over NCCL, on as many GPUs as there are (an even number, two or more)."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from stretto.layout import Layout
from stretto.parallel_state import GroupOptions, ParallelState
from stretto.testing import Pool
from stretto.world import World

GPUS = torch.cuda.device_count() // 2 * 2

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="needs 2 GPUs")]


def total(state: ParallelState, *names: str) -> float:
    """The sum of the ranks on an axis, over its group."""
    x = torch.full((1,), float(state.world.rank), device=state.world.device)
    axis = state.axis(*names)
    if axis.group is not None:
        dist.all_reduce(x, group=axis.group)
    return x.item()


def check(state: ParallelState) -> None:
    for axis in state:
        assert total(state, *axis.name.split("-")) == sum(axis.ranks), axis


def every_axis(world: World, sizes: dict[str, int]) -> list[tuple[str, float, float | None]]:
    with ParallelState.build(Layout.of(**sizes), world, timeout=60) as state:
        check(state)
        return [(cost.name, cost.milliseconds, cost.megabytes) for cost in state.costs]


@pytest.mark.parametrize("sizes", [{"tp": GPUS}, {"dp": GPUS}, {"pp": GPUS}, {"tp": 2, "dp": GPUS // 2}], ids=str)
def test_members_hear_exactly_each_other(gpus: Pool, sizes: dict[str, int]) -> None:
    for costs in gpus.run(GPUS, every_axis, sizes):
        assert costs
        print(costs)


def two_at_once_and_again(world: World) -> None:
    first, second = Layout.of(tp=2, dp=world.size // 2), Layout.of(pp=world.size)
    for _ in range(3):
        with ParallelState.build(first, world, timeout=60) as a, ParallelState.build(second, world, timeout=60) as b:
            check(a)
            check(b)


def test_two_layouts_and_again(gpus: Pool) -> None:
    gpus.run(GPUS, two_at_once_and_again)


def with_options(world: World) -> None:
    options = {
        "tp": GroupOptions(high_priority=True, min_ctas=1, max_ctas=4, timeout=30),
        "dp": GroupOptions(cpu=True),
    }
    layout = Layout.of(tp=world.size)
    with ParallelState.build(layout, world, timeout=60, options=options) as state:
        check(state)
        backend = state.axis("tp").group._get_backend(world.device)
        assert backend.options.is_high_priority_stream
        assert backend.options.config.max_ctas == 4
        assert backend.options._timeout.total_seconds() == 30
    with ParallelState.build(Layout.of(dp=world.size), world, timeout=60, options=options) as state:
        check(state)
        x = torch.ones(1)
        dist.all_reduce(x, group=state.axis("dp").group)
        assert x.item() == world.size


def test_options_reach_nccl_and_gloo_stands_beside_it(gpus: Pool) -> None:
    gpus.run(GPUS, with_options)


def gloo_in_place_of_nccl(world: World) -> str:
    options = {"dp": GroupOptions(backend="gloo")}
    with ParallelState.build(Layout.of(dp=world.size), world, timeout=60, options=options) as state:
        check(state)
        group = state.axis("dp").group
        assert dist.get_backend(state.axis("dp", "cp").group) == "nccl"
        return str(dist.get_backend(group))


def test_an_axis_may_have_a_back_end_of_its_own(gpus: Pool) -> None:
    assert gpus.run(GPUS, gloo_in_place_of_nccl) == ["gloo"] * GPUS


def halves(world: World) -> None:
    """Each half of the ranks is a world of its own: no group may need the others."""
    half = world.size // 2
    members = tuple(range(half)) if world.rank < half else tuple(range(half, world.size))
    own = replace(world, rank=members.index(world.rank), size=half, ranks=members)
    if world.rank < half:
        with ParallelState.build(Layout.of(dp=half), own, timeout=60) as state:
            check(state)


def test_groups_of_a_part_do_not_need_the_others(gpus: Pool) -> None:
    gpus.run(GPUS, halves)


def fail_with_work_under_way(world: World) -> float:
    start = time.monotonic()
    try:
        with ParallelState.build(Layout.of(tp=world.size), world, timeout=60) as state:
            if world.rank == 0:
                dist.all_reduce(torch.ones(1, device=world.device), group=state.axis("tp").group)
                raise LookupError("out of luck")  # while the kernel waits for peers that never come
            time.sleep(2)
            raise LookupError("out of luck too")
    except LookupError:
        return time.monotonic() - start


def test_a_failing_rank_leaves_while_a_collective_is_under_way(gpus: Pool) -> None:
    assert all(seconds < 10 for seconds in gpus.run(GPUS, fail_with_work_under_way))
