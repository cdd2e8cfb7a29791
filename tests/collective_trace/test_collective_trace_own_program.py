"""A program of one's own, with `initialize` and a `Trainer`, tells as much of a rank that hangs as `stretto train`.

Faults to catch: a program of one's own that is not told who did not come.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.gloo


def test_a_rank_that_is_stuck_in_its_data_is_named(torchrun: list[str]) -> None:
    """It answers, so no roll call misses it; what it lacks is a communication."""
    program = Path(__file__).with_name("hanging_program.py")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*torchrun, str(program)], capture_output=True, text=True, timeout=60, check=False, env=env)
    assert ended.returncode == 1
    assert "rank 1 did not come, and said nothing: stuck outside of communication, or gone" in ended.stderr
    assert "rank 0 did not" not in ended.stderr
    assert "stretto/distributed/bucket.py" in ended.stderr
