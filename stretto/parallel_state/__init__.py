"""The process groups of a layout, as this rank holds them."""

from stretto.parallel_state.create import GroupCost, costs_line
from stretto.parallel_state.plan import GroupOptions, PlannedGroup, default_axes, plan
from stretto.parallel_state.state import ParallelState

__all__ = ["GroupCost", "GroupOptions", "ParallelState", "PlannedGroup", "costs_line", "default_axes", "plan"]
