"""The pool of workers: results, first causes, hangs, and a next call that is not disturbed."""

from __future__ import annotations

import os
import signal
import time
import warnings

import pytest
import torch
import torch.distributed as dist

from stretto.testing import Pool, RemoteError, WorkerDiedError, WorkersStuckError
from stretto.world import World

pytestmark = [pytest.mark.gloo, pytest.mark.xdist_group("pool")]  # worlds of its own


def total(world: World, x: torch.Tensor) -> torch.Tensor:
    y = x * (world.rank + 1)
    dist.all_reduce(y)
    return y


def places(world: World) -> tuple[int, int, tuple[int, ...], int]:
    return world.rank, world.size, world.ranks, dist.get_world_size()


def raise_on_one(world: World, rank: int) -> None:
    if world.rank == rank:
        raise KeyError(f"the fault of rank {rank}")
    dist.barrier()


def die_on_one(world: World, rank: int) -> None:
    if world.rank == rank:
        time.sleep(0.2)  # the others wait for us by then, and say "connection closed" when we are gone
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def never_arrive(world: World) -> None:
    if world.rank != 1:
        dist.barrier()


def warn(world: World) -> None:
    warnings.warn("mind the gap", UserWarning, stacklevel=1)


def pid(world: World) -> int:
    return os.getpid()


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_runs_as_a_world_of_n(pool: Pool, n: int) -> None:
    assert pool.run(n, places) == [(rank, n, tuple(range(n)), n) for rank in range(n)]
    for y in pool.run(n, total, torch.ones(3)):
        assert y.tolist() == [n * (n + 1) / 2] * 3


def test_raises_what_the_faulty_rank_raised_not_what_followed(pool: Pool) -> None:
    start = time.monotonic()
    with pytest.raises(KeyError, match="the fault of rank 2") as caught:
        pool.run(4, raise_on_one, 2)
    assert time.monotonic() - start < 5
    assert isinstance(caught.value.__cause__, RemoteError)
    assert "On rank 2" in str(caught.value.__cause__)
    assert "in raise_on_one" in str(caught.value.__cause__)


def test_names_the_rank_that_died_and_how(pool: Pool) -> None:
    with pytest.raises(WorkerDiedError, match=r"rank 1 ended by SIGKILL"):
        pool.run(3, die_on_one, 1)


def test_ends_a_hang_with_the_stacks_of_the_stuck(pool: Pool) -> None:
    start = time.monotonic()
    with pytest.raises(WorkersStuckError, match=r"(?s)2 of 3 ranks not done after 1 s: \[0, 2\].*never_arrive"):
        pool.run(3, never_arrive, timeout=1)
    assert time.monotonic() - start < 8


def test_a_failure_leaves_the_next_call_alone(pool: Pool) -> None:
    with pytest.raises(KeyError):
        pool.run(2, raise_on_one, 0)
    assert [y.item() for y in pool.run(8, total, torch.ones(1))] == [36.0] * 8


def test_workers_are_reused(pool: Pool) -> None:
    assert pool.run(2, pid) == pool.run(4, pid)[:2]


def test_warnings_are_errors_in_workers_as_in_the_caller(pool: Pool) -> None:
    with pytest.raises(UserWarning, match="mind the gap"):
        pool.run(1, warn)


def test_refuses_more_ranks_than_it_has(pool: Pool) -> None:
    with pytest.raises(ValueError, match="n=9 ranks asked of a pool of 8"):
        pool.run(9, places)


def test_two_pools_live_in_one_process_and_leave_nothing(pool: Pool) -> None:
    with Pool(2) as other:
        pids = other.run(2, pid)
        assert pool.run(1, pid)[0] not in pids
    for number in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)
