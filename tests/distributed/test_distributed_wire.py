"""Gradients that travel in bf16: each rank's is rounded, and their sum is not.

Faults to catch: parts that are added in bf16; an own part that is rounded; replicas that are given other sums.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stretto.distributed.wire import WireSum
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.testing import Pool
from stretto.world import World

pytestmark = pytest.mark.gloo

SIZE = 3 * 8


def part(rank: int) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(rank)) + 1 / 300


def test_only_what_travels_is_rounded(pool: Pool) -> None:
    sums = pool.run(3, _sums)
    for rank, (scattered, whole) in enumerate(sums):
        own = slice(8 * rank, 8 * rank + 8)
        parts = [part(r) if r == rank else part(r).bfloat16().float() for r in range(3)]
        want = torch.zeros(8)
        for each in parts:
            want += each[own]
        assert torch.equal(scattered, want)
        assert torch.equal(whole, sums[0][1])
        assert torch.equal(whole[own], want[: len(whole[own])].bfloat16().float())
        exact = sum(part(r) for r in range(3))
        assert 1e-4 < (whole - exact[: len(whole)]).norm() / exact.norm() < 2**-8


def _sums(world: World) -> tuple[Tensor, Tensor]:
    """The part of the sum that is this rank's; and the whole of one whose length does not divide."""
    with ParallelState.build(Layout.of(dp=world.size), world) as state:
        axis, x, y = state.axis("dp", "cp"), part(world.rank), part(world.rank)[:-1].clone()
        out = x[8 * world.rank : 8 * world.rank + 8]
        for each in (WireSum(x, axis, torch.bfloat16, out), WireSum(y, axis, torch.bfloat16)):
            each.wait()
        return out.clone(), y
