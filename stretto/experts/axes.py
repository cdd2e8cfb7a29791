"""The axes of the experts of a rank."""

from __future__ import annotations

from stretto.parallel_state import ParallelState
from stretto.world import ExpertAxes


def expert_axes(state: ParallelState) -> ExpertAxes:
    """Where this rank is among the holders of experts; alone with all of them where the state has no such axes."""
    if not state.has("etp", "ep"):
        return ExpertAxes.single()
    exchange = state.axis("etp", "ep")
    at = [state.layout.coords(rank) for rank in exchange.ranks]
    return ExpertAxes(state.axis("ep"), state.axis("etp"), exchange, tuple((each["ep"], each["etp"]) for each in at))
