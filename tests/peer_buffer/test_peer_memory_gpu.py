"""What lies in memory that others read is gathered and summed as NCCL would, whoever is late.

Each test writes over what was read as soon as it may, and lets ranks in turn be late: what is read before it is
written, or written before it is read, shows as wrong numbers.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stretto.collectives import all_gather_into, reduce_scatter_into
from stretto.layout import Layout
from stretto.parallel_state import GroupOptions, ParallelState
from stretto.peer_memory import CHUNK
from stretto.testing import Pool
from stretto.world import World

GPUS = torch.cuda.device_count()

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="needs 2 GPUs")]


def late(world: World, n: int) -> None:
    """Every rank in its turn is busy for a millisecond or so first."""
    if n % (world.size + 1) == world.rank:
        torch.cuda._sleep(2_000_000)


def numbers(numel: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Small whole ones: sums are exact."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randint(-8, 8, (numel,), device="cuda", generator=generator).to(dtype)


def as_nccl_has_it(world: World) -> None:
    with ParallelState.build(
        Layout.of(dp=world.size), world, timeout=60, options={"dp": GroupOptions(peer_memory=True)}
    ) as state:
        axis = state.axis("dp")
        memory = axis.peer_memory
        assert memory is not None
        plain = replace(axis, peer_memory=None)
        for numel, dtype in ((1536, torch.bfloat16), (3 * CHUNK // 8 + 128, torch.float32), (4096, torch.float64)):
            shard, whole = memory.empty(numel, dtype), memory.empty(numel * axis.size, dtype)
            grads, total = memory.empty(numel * axis.size, dtype), torch.zeros(numel, dtype=dtype, device="cuda")
            own = whole[axis.rank * numel : (axis.rank + 1) * numel]
            mine = grads[axis.rank * numel : (axis.rank + 1) * numel]
            want_total = total.clone()
            for n in range(9):
                memory.settle(shard)
                memory.settle(whole)
                x = numbers(numel, dtype, n * axis.size + axis.rank)
                late(world, n)
                shard.copy_(x)
                own.copy_(x)
                want, got = torch.empty_like(whole), torch.empty_like(whole)
                all_gather_into(want, x, plain).wait()
                works = [all_gather_into(got, shard, axis), all_gather_into(whole, own, axis)]
                for work in works:
                    work.wait()
                assert torch.equal(got, want)
                assert torch.equal(whole, want)

                for add in (False, True, True):
                    memory.settle(grads)
                    y = numbers(numel * axis.size, dtype, 1000 + 3 * n + axis.rank)
                    late(world, n + 1)
                    grads.copy_(y)
                    reduce_scatter_into(want_total, y, plain, add=add).wait()
                    reduce_scatter_into(total, grads, axis, add=add).wait()
                    assert torch.equal(total, want_total)
                memory.settle(grads)
                y = numbers(numel * axis.size, dtype, 2000 + 3 * n + axis.rank)
                grads.copy_(y)
                summed = torch.empty_like(total)
                reduce_scatter_into(summed, y, plain).wait()
                reduce_scatter_into(mine, grads, axis).wait()
                assert torch.equal(mine, summed)


def test_gathers_and_sums_are_those_of_nccl(gpus: Pool) -> None:
    gpus.run(GPUS, as_nccl_has_it)
