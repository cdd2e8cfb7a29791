"""A real step beside the simulated one, with sleeps as computation."""

from __future__ import annotations

import pytest

from benchmarks.schedules import sleeping
from stretto.testing import Pool

pytestmark = pytest.mark.gloo


def test_a_step_takes_what_the_simulation_says(pool: Pool) -> None:
    """A sleep is never too short, so a step is never quicker than simulated, however slow the machine: catches a clock
    that leaves out a computation, and a simulation that idles where ranks do not. That it is at most twice as slow
    catches an executor that waits for every message."""
    rows = pool.run(2, sleeping, "zbv", 2, 4, 0.1, 0.0)
    for row in rows:
        assert row.measured >= 0.999 * row.simulated
        assert row.measured < 2 * row.simulated
        assert len(row.bubbles) == 2
