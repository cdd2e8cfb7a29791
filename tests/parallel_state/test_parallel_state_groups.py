"""Process groups of a layout, over real processes."""

from __future__ import annotations

import gc
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.testing import Pool
from stretto.world import World

pytestmark = pytest.mark.gloo

COMBINATIONS = (
    ("tp",),
    ("cp",),
    ("dp",),
    ("pp",),
    ("dp", "cp"),
    ("tp", "pp"),
    ("embed",),
    ("tp", "cp", "dp", "pp"),
)


def gathered(state: ParallelState, names: tuple[str, ...]) -> tuple[int, ...]:
    """The ranks on an axis, as they themselves say through a collective."""
    axis = state.axis(*names)
    mine = torch.tensor([state.world.rank])
    if axis.group is None:
        return (state.world.rank,)
    found = [torch.empty_like(mine) for _ in axis.ranks]
    dist.all_gather(found, mine, group=axis.group)
    return tuple(int(x) for x in found)


def all_groups(world: World, sizes: dict[str, int]) -> dict[tuple[str, ...], tuple[int, ...]]:
    layout = Layout.of(**sizes)
    with ParallelState.build(layout, world, timeout=20) as state:
        for names in COMBINATIONS:
            axis = state.axis(*names)
            assert axis.ranks[axis.rank] == world.rank
            assert (axis.group is None) == (axis.size == 1)
            assert state.axis(*reversed(names)) is axis
        return {names: gathered(state, names) for names in COMBINATIONS}


@pytest.mark.parametrize(
    "sizes",
    [
        {"tp": t, "cp": c, "dp": 8 // (t * c * p), "pp": p}
        for t, c, p in product((1, 2, 4), (1, 2), (1, 2, 4))
        if 8 % (t * c * p) == 0
    ]
    + [{"dp": 3}, {"tp": 2, "pp": 3}, {}],
    ids=str,
)
def test_members_hear_exactly_each_other(pool: Pool, sizes: dict[str, int]) -> None:
    layout = Layout.of(**sizes)
    for rank, groups in enumerate(pool.run(layout.world, all_groups, sizes)):
        assert groups == {names: layout.group(rank, *names) for names in COMBINATIONS}


def totals(state: ParallelState) -> tuple[float, ...]:
    """One sum over each axis of more than one rank."""
    found = []
    for name in ("tp", "dp", "pp", "embed"):
        axis = state.axis(name)
        x = torch.tensor(float(state.world.rank))
        if axis.group is not None:
            dist.all_reduce(x, group=axis.group)
        found.append(x.item())
    return tuple(found)


def expected_totals(layout: Layout, rank: int) -> tuple[float, ...]:
    return tuple(float(sum(layout.group(rank, name))) for name in ("tp", "dp", "pp", "embed"))


def two_at_once(world: World) -> None:
    first, second = Layout.of(tp=2, dp=2, pp=2), Layout.of(dp=2, pp=4)
    with ParallelState.build(first, world) as a, ParallelState.build(second, world) as b:
        for _ in range(3):
            assert totals(a) == expected_totals(first, world.rank)
            assert totals(b) == expected_totals(second, world.rank)
        a.close()
        assert totals(b) == expected_totals(second, world.rank)


def test_two_layouts_live_in_one_process(pool: Pool) -> None:
    pool.run(8, two_at_once)


def entries(directory: str) -> int:
    return sum(1 for _ in Path(directory).iterdir())


def resources() -> tuple[int, int, tuple[int, ...]]:
    """Threads, open files and the sizes of torch's tables of groups in this process."""
    tables = (c10d._pg_map, c10d._pg_names, c10d._pg_group_ranks, c10d._pg_backend_config)
    by_tag = [*map(len, c10d._world.tags_to_pg.values()), len(c10d._world.pg_to_tag)]
    return entries("/proc/self/task"), entries("/proc/self/fd"), (*map(len, tables), *by_tag)


def build_again_and_again(world: World, times: int) -> None:
    """Layouts of different depth in turn: middle stages own fewer groups than end stages."""
    layouts = [Layout.of(pp=4), Layout.of(dp=2, pp=2), Layout.of(tp=2, dp=2)]
    after = []
    for i in range(times):
        layout = layouts[i % len(layouts)]
        with ParallelState.build(layout, world) as state:
            assert totals(state) == expected_totals(layout, world.rank)
        del state
        if i in (0, times - 1):
            gc.collect()
        after.append(resources())
    assert after[-1] == after[0], f"rank {world.rank} leaks (threads, files, tables): {after[0]} -> {after[-1]}"


@pytest.mark.nightly
def test_fifty_states_one_after_another_leave_nothing_behind(pool: Pool) -> None:
    pool.run(4, build_again_and_again, 50, timeout=120)


def part(world: World, members: tuple[int, ...]) -> World:
    """The world of these ranks of a larger one."""
    return replace(world, rank=members.index(world.rank), size=len(members), ranks=members)


def in_a_part(world: World) -> None:
    members = (2, 3, 4, 5) if world.rank in (2, 3, 4, 5) else (0, 1, 6, 7)
    layout = Layout.of(tp=2, pp=2) if world.rank in (2, 3, 4, 5) else Layout.of(tp=2, dp=2)
    own = part(world, members)
    with ParallelState.build(layout, own) as state:
        assert totals(state) == expected_totals(layout, own.rank)
        tp = state.axis("tp")
        assert dist.get_process_group_ranks(tp.group) == [members[rank] for rank in tp.ranks]


def test_a_world_may_be_a_part_of_the_processes(pool: Pool) -> None:
    pool.run(8, in_a_part)
