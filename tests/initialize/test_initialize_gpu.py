"""Two GPUs: device and back ends, a pool with NCCL, and a failure while another rank is stuck in NCCL."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch
import torch.distributed as dist

from stretto.initialize import initialize
from stretto.launch.local import run_local
from stretto.testing import Fresh, Pool
from stretto.world import World

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def sums(world: World) -> tuple[float, float, int]:
    on_gpu, on_cpu = torch.ones(1, device=world.device), torch.ones(1)
    dist.all_reduce(on_gpu)
    dist.all_reduce(on_cpu)
    return on_gpu.item(), on_cpu.item(), torch.cuda.current_device()


def add(_what: str) -> int:
    with initialize(device="cuda", timeout=60) as world:
        assert sums(world) == (2.0, 2.0, world.local_rank)
        assert world.device == torch.device("cuda", world.local_rank)
    return 0


def raise_while_another_is_stuck(_what: str) -> int:
    with initialize(device="cuda", timeout=600) as world:
        sums(world)
        if world.rank == 1:
            raise ValueError("the fault of rank 1")
        dist.all_reduce(torch.ones(1, device=world.device))
        torch.cuda.synchronize()
    return 0


def same_bits_twice(_what: str) -> int:
    """An index_add_ with many collisions: atomics sum it in another order each time, unless told not to."""
    with initialize(device="cuda", deterministic=True, seed=3, env={}) as world:
        index = torch.randint(0, 7, (1_000_000,), device=world.device)
        values = torch.randn(1_000_000, device=world.device)

        def total() -> torch.Tensor:
            return torch.zeros(7, device=world.device).index_add_(0, index, values)

        first = total()
        assert all(torch.equal(first, total()) for _ in range(20))
    return 0


def launch(what: str) -> int:
    return run_local(2, partial(globals()[what], what))


def test_device_and_both_back_ends(fresh: Fresh) -> None:
    ended = fresh.run(launch, "add", timeout=120)
    assert ended.code == 0, ended.err


def test_a_rank_stuck_in_nccl_ends_within_15_s(fresh: Fresh) -> None:
    ended = fresh.run(launch, "raise_while_another_is_stuck", timeout=120)
    assert ended.code == 1
    assert ended.err.endswith("ValueError: the fault of rank 1\n"), ended.err
    print(f"ended after {ended.seconds:.1f} s")
    assert ended.seconds < 15 + 15  # the start of NCCL before it


def test_without_a_launcher_that_watches_too(fresh: Fresh, port: int) -> None:
    ended = fresh.run(both_by_hand, port, timeout=120)
    assert ended.err.rstrip().endswith("ValueError: the fault of rank 1"), ended.err
    print(f"ended after {ended.seconds:.1f} s")
    assert ended.seconds < 15 + 15


def by_hand(rank: int, port: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    raise_while_another_is_stuck("")


def both_by_hand(port: int) -> int:
    from multiprocessing import Process

    ranks = [Process(target=by_hand, args=(rank, port)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return 0


def test_deterministic_mode_gives_the_same_bits(fresh: Fresh) -> None:
    ended = fresh.run(same_bits_twice, "", timeout=120)
    assert ended.code == 0, ended.err


def test_a_pool_on_gpus(gpus: Pool) -> None:
    assert gpus.run(2, sums, timeout=120) == [(2.0, 2.0, 0), (2.0, 2.0, 1)]
    assert gpus.run(1, sums, timeout=120) == [(1.0, 1.0, 0)]
