"""Parts of a sum are added in the order of the ranks, none before it is used up, nor written while others read it.

Faults to catch: gradients written over that others still read; a sum in which a rank's own part is another's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from peer_stand_in import copy_engines, memory_over

from stretto import peer_memory
from stretto.collectives import all_gather_into, reduce_scatter_into
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.peer_memory import _all_but_last
from stretto.testing import Pool
from stretto.world import World

pytestmark = pytest.mark.gloo

NUMEL = 2048


@pytest.mark.parametrize(("size", "rank"), [(size, rank) for size in range(2, 6) for rank in range(size)])
def test_every_part_counts_once_on_every_rank(size: int, rank: int) -> None:
    """Catches a partial sum that is written over a part still to come: from three ranks on there are such."""
    given = [torch.randn(7, generator=torch.Generator().manual_seed(n)) for n in range(size)]
    parts = [x.clone() for x in given]
    first, last = _all_but_last(parts, parts[rank])
    want = given[0]
    for each in given[1:]:
        want = want + each
    assert torch.equal(first + last, want)
    assert torch.equal(parts[rank], given[rank])


def as_the_group_has_it(world: World, folder: Path) -> None:
    """Sums of several chunks, which are added or not, and gathers out of place and in it."""
    with (
        ParallelState.build(Layout.of(dp=world.size), world, timeout=60) as state,
        copy_engines(folder, world.rank),
        mock.patch.object(peer_memory, "CHUNK", NUMEL),
    ):
        plain = state.axis("dp")
        assert plain.group is not None
        memory = memory_over(plain.group)
        axis = replace(plain, peer_memory=memory)
        shard, whole, grads = (memory.empty(n, torch.float32) for n in (NUMEL, *[NUMEL * axis.size] * 2))
        own = whole[axis.rank * NUMEL : (axis.rank + 1) * NUMEL]
        total, want_total = torch.zeros(NUMEL), torch.zeros(NUMEL)
        for n in range(12):
            for x in (shard, whole, grads):
                memory.settle(x)
            x, y = (
                torch.randn(k, generator=torch.Generator().manual_seed(n * 8 + axis.rank))
                for k in (NUMEL, grads.numel())
            )
            shard.copy_(x)
            own.copy_(x)
            grads.copy_(y)
            want, got = torch.empty_like(whole), torch.empty_like(whole)
            all_gather_into(want, x, plain).wait()
            for work in (all_gather_into(got, shard, axis), all_gather_into(whole, own, axis)):
                work.wait()
            assert torch.equal(got, want)
            assert torch.equal(whole, want)
            reduce_scatter_into(want_total, y, plain, add=n % 3 > 0).wait()
            reduce_scatter_into(total, grads, axis, add=n % 3 > 0).wait()
            torch.testing.assert_close(total, want_total)


@pytest.mark.parametrize("ranks", [2, 3])
def test_gathers_and_sums_are_those_of_the_group(pool: Pool, tmp_path: Path, ranks: int) -> None:
    """Whoever is late, and written over as soon as it may be."""
    pool.run(ranks, as_the_group_has_it, tmp_path)
