"""A rank that fails takes its groups with it, and leaves no peer waiting."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from stretto.initialize import initialize
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.testing import Pool
from stretto.world import World

pytestmark = pytest.mark.gloo


def fail_on_rank_1(world: World) -> tuple[str, float]:
    start = time.monotonic()
    try:
        with ParallelState.build(Layout.of(dp=4), world, timeout=30) as state:
            if world.rank == 1:
                raise LookupError("out of luck")
            dist.all_reduce(torch.ones(1000), group=state.axis("dp").group)
    except (LookupError, RuntimeError) as error:
        return type(error).__name__, time.monotonic() - start
    return "", 0.0


def test_peers_of_a_failed_rank_hear_of_it_before_the_time_out(pool: Pool) -> None:
    said = pool.run(4, fail_on_rank_1, timeout=60)
    assert said[1][0] == "LookupError"
    for rank in (0, 2, 3):
        assert said[rank][0] == "RuntimeError"
    assert all(seconds < 10 for _, seconds in said)


def wait_in_vain(world: World) -> float:
    start = time.monotonic()
    with ParallelState.build(Layout.of(dp=2), replace(world, timeout=2.0)) as state:
        if world.rank == 1:
            time.sleep(4)
            return 0.0
        with pytest.raises(RuntimeError):
            dist.all_reduce(torch.ones(1000), group=state.axis("dp").group)
        return time.monotonic() - start


def test_groups_wait_as_long_as_initialize_said(pool: Pool) -> None:
    """Catches: `initialize(timeout=20)`, and a rank that does not come is waited for for ten minutes."""
    assert pool.run(2, wait_in_vain, timeout=60)[0] < 4


def fail_while_building(world: World) -> None:
    """Rank 2 cannot create its second group: it leaves, and its peers run into the time-out of the build."""
    from stretto.parallel_state import state as module

    created = []

    def create(*args: object) -> object:
        if world.rank == 2 and created:
            raise MemoryError("no memory for a communicator")
        created.append(args)
        return original(*args)

    original = module.create_group
    module.create_group = create  # type: ignore[assignment]
    try:
        with pytest.raises(MemoryError if world.rank == 2 else Exception):
            ParallelState.build(Layout.of(tp=2, dp=2), world, timeout=2)
    finally:
        module.create_group = original
    tables = dist.distributed_c10d._world
    assert len(tables.pg_names) == 1  # the default group alone


def test_a_build_that_fails_half_way_leaves_nothing(pool: Pool) -> None:
    pool.run(4, fail_while_building)


def join_once_more(world: World) -> None:
    here = {"RANK": f"{world.rank}", "WORLD_SIZE": "2", "LOCAL_RANK": f"{world.rank}", "LOCAL_WORLD_SIZE": "2"}
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "OMP_NUM_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (here | there).items():
            patch.setenv(name, value)
        with pytest.raises(RuntimeError, match=r"go on with the world of the stretto\.initialize\(\) before"):
            initialize(device="cpu", start_timeout=1).__enter__()


def test_a_process_that_joins_twice_is_told_at_once(pool: Pool) -> None:
    """Catches: a meeting of ranks that have met already, at which all wait, or one comes too late."""
    pool.run(2, join_once_more)
