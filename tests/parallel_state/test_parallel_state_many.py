"""Sixty-four real ranks on one machine, and ranks on two hosts."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.parallel_state.plan import members
from stretto.testing import Pool
from stretto.world import World

pytestmark = [pytest.mark.gloo, pytest.mark.nightly, pytest.mark.xdist_group("pool")]  # worlds of its own


@pytest.fixture(scope="module")
def crowd() -> Iterator[Pool]:
    with Pool(64) as pool:
        yield pool


def hear_all(world: World, sizes: dict[str, int]) -> tuple[list[tuple[str, list[int]]], float]:
    """What each axis says of its members, and the seconds that the build took."""
    start = time.perf_counter()
    with ParallelState.build(Layout.of(**sizes), world, timeout=100) as state:
        seconds = time.perf_counter() - start
        heard = []
        for axis in state:
            if axis.group is not None:
                found = [torch.zeros(1, dtype=torch.int64) for _ in axis.ranks]
                dist.all_gather(found, torch.tensor([world.rank]), group=axis.group)
                heard.append((axis.name, [int(x) for x in found]))
        return heard, seconds


@pytest.mark.parametrize("sizes", [{"tp": 4, "cp": 2, "dp": 2, "pp": 4, "ep": 4}], ids=str)
def test_sixty_four_ranks_hear_exactly_each_other(crowd: Pool, sizes: dict[str, int]) -> None:
    layout = Layout.of(**sizes)
    slowest = 0.0
    for rank, (heard, seconds) in enumerate(crowd.run(64, hear_all, sizes, timeout=200)):
        slowest = max(slowest, seconds)
        assert len(heard) > 10
        for name, ranks in heard:
            assert ranks == list(members(layout, rank, tuple(name.split("-")))), (rank, name)
    print(f"64 ranks built {len(heard)} axes each in {slowest:.1f} s")
