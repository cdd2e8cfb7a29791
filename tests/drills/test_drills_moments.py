"""The moments at which drills stop a rank are there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gloo


def test_every_moment_is_a_phase_or_a_function_of_the_package() -> None:
    """Catches a drill that never happens, since what it waits for is called otherwise now."""
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        from drill_rank import PHASES, PLACES
        from drills import MOMENTS
    finally:
        sys.path.pop(0)
    assert set(MOMENTS) <= {*PHASES, *PLACES}
    assert not [name for where, name in PLACES.values() if not hasattr(where, name)]
