"""Tokens that go to experts by copy engines: those of a stand-in, so that ranks without GPUs are enough.

Faults to catch: the counts of what other ranks get taken for one's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from peer_stand_in import buffer_over

from benchmarks.verified import layout_of
from stretto import peer_buffer
from stretto.experts.axes import expert_axes
from stretto.parallel_state import ParallelState
from stretto.testing import Pool
from stretto.train import build
from stretto.verify import Comparison, against_reference
from stretto.verify.matrix import Combination, example
from stretto.world import ExpertAxes, World

pytestmark = pytest.mark.gloo

BYTES = 2**20


@contextmanager
def by_copy_engines(folder: Path, used: list[int]) -> Iterator[None]:
    """Every exchange of more than one rank goes through a buffer, however small; `used` gets the messages of each."""
    with ExitStack() as stack:
        buffers = []

        def axes(state: ParallelState) -> ExpertAxes:
            found = expert_axes(state)
            if found.exchange.size == 1:
                return found
            place = folder / str(found.exchange.ranks[0])
            place.mkdir(exist_ok=True)
            buffers.append(stack.enter_context(buffer_over(found.exchange, place, BYTES)))
            return replace(found, exchange=replace(found.exchange, peer_buffer=buffers[-1]))

        stack.enter_context(mock.patch.object(build, "expert_axes", axes))
        stack.enter_context(mock.patch.object(peer_buffer, "LEAST", 1))
        yield
        used += [buffer._number for buffer in buffers]


def compared(world: World, of: Combination, folder: Path) -> tuple[Comparison, list[int]]:
    used: list[int] = []
    with by_copy_engines(folder, used):
        found = against_reference(example(of, options=True), layout_of(of), world, steps=2)
    return found, used


@pytest.mark.parametrize(
    ("tensor", "experts"),
    [("-", "ep"), pytest.param("tp", "ep + etp", marks=pytest.mark.nightly), ("-", "ep, in halves")],
)
def test_a_layout_equals_one_process(pool: Pool, tmp_path: Path, tensor: str, experts: str) -> None:
    of = Combination(tensor, "-", "-", "dp", experts, "-", "-", "-", "fp64")
    for found, used in pool.run(layout_of(of).world, compared, of, tmp_path):
        assert not found.unequal
        assert found.equal, [f"{d.name}: {d.error:.1e}" for d in found.failures[:8]]
        assert len(used) == 1
        assert used[0] > 2 * 2 * 4  # steps, layers, rows and outputs there and back
