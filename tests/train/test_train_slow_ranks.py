"""A slow rank is named while the run goes on, within twenty steps, and no other.

Faults to catch: time spent in waiting for others that counts as work; a rank compared with stages that do other work;
a rank named again and again.
"""

from __future__ import annotations

import logging
import time

import pytest
import torch

from stretto.collective_trace import Waits
from stretto.collectives import all_gather, all_reduce
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.testing import Pool
from stretto.train.slow_ranks import Slow, SlowRanks, find, packed
from stretto.world import World

pytestmark = pytest.mark.gloo

BUSY, SLOW = 0.01, 0.05
BEGINS = 3


def _steps(world: World, victim: int) -> list[tuple[int, str]]:
    """Steps of two stages, whose second one has twice as much to do; the victim becomes slow. Warnings by step."""
    said: list[tuple[int, str]] = []
    step = 0

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append((step, record.getMessage()))

    logger, handler = logging.getLogger("stretto"), Heard()
    logger.addHandler(handler)
    waits = Waits()
    with ParallelState.build(Layout.of(tp=2, pp=2), world, timer=waits) as state:
        pace = SlowRanks(state, lambda: waits.seconds)
        for step in range(1, 29):
            with pace.step():
                time.sleep(BUSY * (1 + state.axis("pp").rank))
                if world.rank == victim and step >= BEGINS:
                    time.sleep(SLOW)
                all_gather(torch.ones(2), state.axis("tp"))
                all_reduce(torch.ones(2), state.axis("tp", "cp", "dp", "pp"))
    logger.removeHandler(handler)
    return said


def test_a_slow_rank_is_named_once_within_twenty_steps(pool: Pool) -> None:
    heard = pool.run(4, _steps, 1)
    assert heard[1:] == [[], [], []]  # rank 0 tells
    ((step, text),) = heard[0]
    assert text.startswith("rank 1 is slow: it is busy for 0.0")
    assert BEGINS < step <= BEGINS + 20


def test_stages_that_do_more_are_not_slow_ranks() -> None:
    """Of two ranks each; then of one each, where only other stages are there to compare with."""
    assert find([2.0, 4.0], [2, 2], [packed(1.0, 0), packed(2.1, 3)], 4.0) == []
    assert find([1.0, 2.0, 1.0], [1, 1, 1], [packed(1.0, 0), packed(2.0, 1), packed(1.0, 2)], 2.5) == []
    assert find([2.0, 4.0], [2, 2], [packed(1.0, 0), packed(3.0, 3)], 4.0) == [Slow(3, 3.0, 1.0, 4.0)]
    assert [s.rank for s in find([1.0, 9.0], [1, 1], [packed(1.0, 0), packed(9.0, 1)], 9.0)] == [1]


def test_what_costs_little_is_not_worth_a_word() -> None:
    """Of a step, or at all."""
    assert find([0.4, 0.2], [2, 2], [packed(0.3, 0), packed(0.1, 2)], 4.0) == []
    assert find([0.008, 0.004], [2, 2], [packed(0.006, 0), packed(0.002, 2)], 0.01) == []
