"""Messages of a pair by copy engines come whole and in order, whoever is late: without GPUs, see `peer_stand_in`.

Faults to catch: a slot that is filled before it has been read; a message that is fetched before it is there; the slot
of the message before.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peer_stand_in import copy_engines

from stretto.copy_engine import LEAST
from stretto.layout import Layout
from stretto.parallel_state import GroupOptions, ParallelState
from stretto.peer_messages import CopyEngineMessages
from stretto.pipeline_parallel import Link, TensorMeta
from stretto.pipeline_parallel.link import AHEAD_BY_COPY_ENGINES
from stretto.testing import Pool
from stretto.world import World

pytestmark = pytest.mark.gloo

ROWS = LEAST // 8
MOST = 3
"""Times `LEAST`, of a message."""


def number(n: int, size: int) -> torch.Tensor:
    return torch.arange(size, dtype=torch.float64) + 1000 * n


def through_a_link(world: World, folder: Path, plan: list[tuple[int, int]]) -> tuple[int, int]:
    """Messages (whence, how large) in one order on both ranks; how many went by copy engines, and how many not."""
    with ParallelState.build(Layout.of(pp=2), world, timeout=60) as state, copy_engines(folder, world.rank):
        down = state.axis("pp:0>1")
        assert down.group is not None
        by = CopyEngineMessages(down.group, world.device, MOST * LEAST)
        pairs = {(0, 1): replace(down, peer_messages=by), (1, 0): state.axis("pp:1>0")}
        link = Link(state.axis("pp"), world.device, pairs)
        coming, wanted = [], []
        for n, (source, size) in enumerate(plan):
            if source == world.rank:
                link.send(number(n, size), 1 - source)
                assert len(link._in_flight[1 - source]) <= AHEAD_BY_COPY_ENGINES or not by.takes(size * 8)
            else:
                coming.append(link.recv(TensorMeta((size,), torch.float64), source))
                wanted.append(number(n, size))
        for message, want in zip(coming, wanted, strict=True):
            assert torch.equal(message.wait(), want)
        link.drain()
        went = by._sent + by._received
        return went, len(plan) - went


sizes = st.sampled_from([7, ROWS - 1, ROWS, ROWS + 5, MOST * ROWS, MOST * ROWS + 512])


@settings(max_examples=8)
@given(st.lists(st.tuples(st.integers(0, 1), sizes), min_size=1, max_size=24))
def test_every_message_comes_whole_and_in_order(pool: Pool, plan: list[tuple[int, int]]) -> None:
    taken = sum(LEAST <= 8 * size <= MOST * LEAST for _, size in plan)
    with TemporaryDirectory() as folder:
        assert pool.run(2, through_a_link, Path(folder), plan) == [(taken, len(plan) - taken)] * 2


def of_three(world: World, folder: Path) -> None:
    with (
        ParallelState.build(Layout.of(pp=3), world, timeout=60) as state,
        copy_engines(folder, world.rank),
        pytest.raises(ValueError, match="between two ranks, not 3"),
    ):
        CopyEngineMessages(state.axis("pp").group, world.device, LEAST)  # type: ignore[arg-type]


def test_they_are_between_two_ranks(pool: Pool, tmp_path: Path) -> None:
    pool.run(3, of_three, tmp_path)


def test_they_have_no_effect_over_gloo() -> None:
    with pytest.raises(ValueError, match="peer_messages would have no effect on gloo"):
        GroupOptions(peer_messages=1).require_effect("pp:0>1", "gloo", "cpu")
