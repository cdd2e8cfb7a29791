"""Layouts whose messages go by copy engines: those of a stand-in, so that ranks without GPUs are enough.

Faults to catch: the counts of what other ranks get taken for one's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
from peer_stand_in import copy_engines, everywhere

from benchmarks.verified import layout_of
from stretto import peer_buffer, peer_messages
from stretto.layout import Layout
from stretto.parallel_state import state
from stretto.peer_buffer import CopyEngineBuffer
from stretto.peer_memory import CopyEngineMemory
from stretto.peer_messages import CopyEngineMessages
from stretto.testing import Pool
from stretto.verify import Comparison, against_reference
from stretto.verify.matrix import Combination, example
from stretto.world import World

pytestmark = pytest.mark.gloo

CASES = [
    (0, Combination("tp + sequence parallel", "-", "-", "zero1", "-", "-", "-", "-", "fp64")),
    (0, Combination("-", "-", "-", "fsdp", "-", "-", "-", "-", "fp64")),
    (0, Combination("-", "cp all-gather", "-", "-", "-", "packing", "-", "-", "fp64")),
    (0, Combination("-", "-", "-", "dp", "ep", "-", "-", "-", "fp64")),
    (0, Combination("-", "-", "interleaved", "-", "-", "-", "-", "-", "fp64")),
    (1, Combination("-", "-", "1f1b", "zero2", "-", "-", "-", "-", "fp64")),
    (1, Combination("-", "cp all-gather", "zbv", "fsdp", "-", "-", "-", "selective recomputation", "fp64")),
    (1, Combination("tp", "-", "-", "fsdp", "ep + etp", "-", "-", "-", "fp64")),
    (1, Combination("-", "-", "-", "dp", "ep, in halves", "-", "-", "-", "fp64")),
]


class Counts(NamedTuple):
    """Messages through buffers, of what lies in memory that others read, and of a rank to one other."""

    buffer: int
    memory: int
    one: int


def compared(world: World, of: Combination, folder: Path, layout: Layout) -> tuple[Comparison, Counts]:
    with (
        copy_engines(folder, world.rank),
        mock.patch.object(state, "open_reach", everywhere),
        mock.patch.object(peer_buffer, "LEAST", 1),
        mock.patch.object(peer_messages, "LEAST", 1),
        counted(CopyEngineBuffer) as of_buffer,
        counted(CopyEngineMemory) as of_memory,
        counted(CopyEngineMessages, "send") as sent,
    ):
        found = against_reference(example(of, options=True), layout, world, steps=2)
    return found, Counts(of_buffer.call_count, of_memory.call_count, sent.call_count)


def counted(kind: type, name: str = "_begin") -> Any:
    """Each message begins there."""
    return mock.patch.object(kind, name, autospec=True, side_effect=getattr(kind, name))


@pytest.mark.parametrize(
    "of", [pytest.param(of, marks=[pytest.mark.nightly] * night, id=str(of)) for night, of in CASES]
)
def test_a_layout_equals_one_process(pool: Pool, tmp_path: Path, of: Combination) -> None:
    buffer = "sequence" in of.tensor or "cp" in of.context or "ep" in of.experts
    for found, messages in pool.run(layout_of(of).world, compared, of, tmp_path, layout_of(of)):
        assert not found.unequal
        assert found.equal, [f"{d.name}: {d.error:.1e}" for d in found.failures[:8]]
        assert (messages.buffer > 0, messages.memory > 0) == (buffer, of.data not in ("-", "dp"))
        assert (messages.one > 0) == (of.pipeline != "-")


def test_what_ranks_of_cp_share_goes_so_with_one_replica(pool: Pool, tmp_path: Path) -> None:
    of = Combination("-", "cp ring", "-", "zero1", "-", "-", "-", "-", "fp64")
    for found, messages in pool.run(2, compared, of, tmp_path, Layout.of(cp=2)):
        assert found.equal, [f"{d.name}: {d.error:.1e}" for d in found.failures[:8]]
        assert messages.memory > 0 == messages.buffer
