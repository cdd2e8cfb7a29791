"""The start-up line: who was slowest in each phase."""

from __future__ import annotations

import contextlib
import time

import pytest

from stretto.initialize.timeline import Phase, Timeline, line, slowest
from stretto.testing import Pool
from stretto.world import World


@pytest.mark.pure
def test_the_slowest_rank_of_each_phase() -> None:
    phases = slowest([{"model": 1.0, "data": 0.5}, {"model": 4.0, "data": 0.25}, {"model": 1.0, "load": 2.0}])
    assert phases == [Phase("model", 4.0, 1, 1.0), Phase("data", 0.5, 0, 0.25), Phase("load", 2.0, 2, 0.0)]
    assert line(phases[:1]) == "start-up 4.0 s: model 4.0 s on rank 1, median 1.0 s"


@pytest.mark.pure
def test_a_phase_adds_up_also_when_it_fails() -> None:
    now = [0.0]
    timeline = Timeline(clock=lambda: now[0])
    with timeline.phase("a"):
        now[0] += 2
    with contextlib.suppress(ValueError), timeline.phase("a"):
        now[0] += 3
        raise ValueError("of the body")
    assert timeline.seconds == {"a": 5.0}


def late(world: World, slow: int) -> list[Phase] | None:
    timeline = Timeline()
    with timeline.phase("data"):
        time.sleep(0.3 if world.rank == slow else 0.0)
    return timeline.gather(world)


@pytest.mark.gloo
def test_gathers_on_rank_0(pool: Pool) -> None:
    first, *others = pool.run(4, late, 2)
    assert [(phase.name, phase.rank) for phase in first] == [("data", 2)]
    assert first[0].seconds >= 0.3
    assert others == [None] * 3
