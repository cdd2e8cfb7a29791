"""The axes that weights go over."""

from __future__ import annotations

from collections.abc import Sequence

from stretto.parallel_state import ParallelState
from stretto.world import Axis


def gather_axis(state: ParallelState, replicas: Sequence[str]) -> Axis:
    """Where weights are gathered: over a communicator of their own where the state has one, so that a gather does not
    wait behind a reduction."""
    own = (f"{replicas[0]}:gather", *replicas[1:])
    return state.axis(*own) if state.has(*own) else state.axis(*replicas)
