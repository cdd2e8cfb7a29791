"""Messages of a peer buffer are those of the group, whoever is late: without GPUs, see `peer_stand_in`.

Faults to catch: rows that are looked for where a rank's own would be; a slot that is written while another reads it;
what comes in the order of those that it is fetched from; the way back with the sizes of the way there; a rank's own
rows from the beginning of their order; a replayed round that begins in the phase where the last one ended; messages
that go on counting after some that were given up.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peer_stand_in import copy_engines

from stretto.collectives import all_gather, all_to_all_rows_async, reduce_scatter
from stretto.copy_engine import LEAST
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.peer_buffer import SLOTS, CopyEngineBuffer
from stretto.testing import Pool
from stretto.world import Axis, RowSplits, World

pytestmark = pytest.mark.gloo

WIDTH = 2**14
"""So wide that few rows are worth it."""
MOST = 24


def numbers(axis: Axis, n: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Small whole ones: sums are exact."""
    generator = torch.Generator().manual_seed(n * axis.size + axis.rank)
    return torch.randint(-8, 8, (rows, WIDTH), generator=generator).to(dtype)


def as_the_group_has_it(world: World, folder: Path, pairs: list[list[list[int]]]) -> int:
    """How many of the messages went through the buffer."""
    went = 0
    with ParallelState.build(Layout.of(tp=world.size), world, timeout=60) as state:
        plain = state.axis("tp")
        with copy_engines(folder, world.rank):
            buffer = CopyEngineBuffer(plain.group, world.device, MOST * WIDTH * 4)  # type: ignore[arg-type]
            axis = replace(plain, peer_buffer=buffer)
            for n, sizes in enumerate(pairs):
                there = RowSplits.of_pairs(sizes, axis.rank)
                ways = [there, there.back] * SLOTS  # more under way than there are slots
                rows = [numbers(axis, n * 8 + k, sum(way.sent), torch.float32) for k, way in enumerate(ways)]
                orders = [None if k % 4 < 2 else torch.randperm(len(x)) for k, x in enumerate(rows)]
                before = buffer._number
                sent = list(zip(rows, ways, orders, strict=True))
                coming = [all_to_all_rows_async(x, way, axis, order) for x, way, order in sent]
                went += buffer._number - before
                for (x, way, order), message in zip(sent, coming, strict=True):
                    ordered = x if order is None else x[order]
                    assert torch.equal(message.wait(), all_to_all_rows_async(ordered, way, plain).wait())
                    assert torch.equal(message.wait(), all_to_all_rows_async(x, way, plain, order).wait())
                x = numbers(axis, n, axis.size * 8, torch.float32)
                assert torch.equal(all_gather(x, axis), all_gather(x, plain))
                assert torch.equal(reduce_scatter(x, axis), reduce_scatter(x, plain))
    return went


class Noting:
    """A driver, and what it is told of flags."""

    def __init__(self, driver: Any) -> None:
        self._driver, self.copy, self.told = driver, driver.copy, list[tuple[str, int, int]]()

    def write(self, address: int, number: int) -> None:
        self.told.append(("write", address, number))
        self._driver.write(address, number)

    def wait_bit(self, address: int, bit: int) -> None:
        self.told.append(("wait", address, bit))
        self._driver.wait_bit(address, bit)


def between_rewinds(world: World, folder: Path, messages: int) -> tuple[bool, int]:
    """Whether flags of the same messages are told the same in each round, and how many there are of a round."""
    with ParallelState.build(Layout.of(tp=world.size), world, timeout=60) as state:
        plain = state.axis("tp")
        with copy_engines(folder, world.rank):
            buffer = CopyEngineBuffer(plain.group, world.device, MOST * WIDTH * 4)  # type: ignore[arg-type]
            noting = Noting(buffer._driver)
            buffer._driver = noting  # type: ignore[assignment]
            axis, rounds = replace(plain, peer_buffer=buffer), []
            for n in range(4):
                for k in range(messages):
                    x = numbers(axis, n * 8 + k, 8, torch.float32)
                    assert torch.equal(all_gather(x, axis), all_gather(x, plain))
                buffer.rewind()
                if n == 2:
                    buffer._driver = mock.Mock()
                    all_gather(x, axis)  # recorded, and given up
                    buffer._driver = noting  # type: ignore[assignment]
                    buffer.restart()
                rounds.append(noting.told)
                noting.told = []
    return all(each == rounds[0] for each in rounds), len(rounds[0])


@pytest.mark.parametrize("messages", [1, 6, 8])
def test_messages_between_rewinds_are_told_the_same_each_time(pool: Pool, tmp_path: Path, messages: int) -> None:
    """So they can be replayed. Catches: a number that grows; a slot or phase that goes on behind the last round."""
    rounded = -(-messages // (2 * SLOTS)) * 2 * SLOTS
    assert pool.run(2, between_rewinds, tmp_path, messages) == [(True, 4 * rounded)] * 2


def sizes_of(ranks: int) -> st.SearchStrategy[list[list[int]]]:
    row = st.lists(st.integers(0, 9), min_size=ranks, max_size=ranks)
    return st.lists(row, min_size=ranks, max_size=ranks)


@given(st.integers(2, 4).flatmap(lambda ranks: st.lists(sizes_of(ranks), min_size=1, max_size=3)))
def test_rows_that_come_are_those_of_the_group(
    pool: Pool, tmp_path_factory: pytest.TempPathFactory, pairs: list[list[list[int]]]
) -> None:
    """Ranks that send nothing, get nothing, or keep all."""
    pool.run(len(pairs[0]), as_the_group_has_it, tmp_path_factory.mktemp("peers"), pairs)


def test_what_is_too_small_or_too_large_goes_through_the_group(pool: Pool, tmp_path: Path) -> None:
    """All ranks say so alike, also those that send nothing; what stays on its rank counts for nothing."""
    few = LEAST // (WIDTH * 4)
    little, enough, much = ([[99, n], [0, 99]] for n in (few - 1, few, MOST + 1))
    assert pool.run(2, as_the_group_has_it, tmp_path, [little, enough, much]) == [2 * SLOTS] * 2
