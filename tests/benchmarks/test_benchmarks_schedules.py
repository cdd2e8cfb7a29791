"""A real step beside the simulated one, with computations padded by sleeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.schedule_steps import Row, resolved_for, stepped
from stretto.schedule.pieces import Pieces
from stretto.testing import Pool
from stretto.world import World

pytestmark = [pytest.mark.gloo, pytest.mark.nightly]

PIECES = Pieces((0.01, 0.01, 0.007), head=(0.062, 0.0, 0.0), shares=(0.4, 0.4, 3 / 7))  # a head of 2.3 layers


def in_turn(world: World, asked: list[tuple[str, ...]]) -> list[Row]:
    return [stepped(world, resolved_for(name, 2, 4, 6, *more), PIECES) for name, *more in asked]


def test_a_step_takes_what_the_simulation_says(pool: Pool, tmp_path: Path) -> None:
    """A sleep is never too short, so a step is never quicker than simulated, however slow the machine: catches a
    simulation that idles where ranks do not. That it is at most twice as slow catches an executor that waits for every
    message.

    The first run measures, and the second places its stages and layers by that: catches costs that do not reach the
    next run, and layers that stay on the rank of a heavy head.
    """
    costs = ("--schedule-costs", str(tmp_path / "costs.json"))
    asked = [("zbv",), ("auto", *costs, "--vpp", "2"), ("auto", *costs, "--partition", "searched")]
    rows = pool.run(2, in_turn, asked)[0]
    for row in rows:
        assert row.measured >= 0.999 * row.simulated
        assert row.measured < 2 * row.simulated
    plain, found = rows[1:]
    assert found.simulated < 0.98 * plain.simulated
    assert found.layers != plain.layers
    assert sum(found.layers) == 6
