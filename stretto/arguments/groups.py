"""What can be said of process groups: the schema's part that is about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stretto.arguments.setting import setting

AxisName = Literal["tp", "dp", "pp", "cp", "dp-cp", "tp-pp", "pp-dp-cp", "embed", "tp-cp-dp-pp"]
"""Axes that have process groups, and combinations of axes that have groups of their own."""


@dataclass(frozen=True)
class GroupsConfig:
    """Process groups, by the axis that they lie along."""

    timeouts: tuple[tuple[AxisName, int], ...] = setting(
        (),
        "a collective of these groups that takes longer ends the run; of the others, --timeout",
        unit="seconds",
        at_least=1,
    )
    gloo: tuple[AxisName, ...] = setting((), "axes whose groups run over Gloo, through the host, and not over NCCL")


@dataclass(frozen=True)
class NcclConfig:
    """How NCCL runs the process groups of an axis."""

    high_priority: tuple[AxisName, ...] = setting((), "axes whose kernels run on a stream of high priority")
    min_ctas: tuple[tuple[AxisName, int], ...] = setting(
        (), "at least so many thread blocks for a kernel", at_least=1, at_most=64
    )
    max_ctas: tuple[tuple[AxisName, int], ...] = setting(
        (), "at most so many thread blocks for a kernel", at_least=1, at_most=64
    )
