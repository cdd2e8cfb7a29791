"""Pictures of schedules, in plain text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, log10
from types import MappingProxyType
from typing import Final

from stretto.schedule.actions import COMPUTE, Op
from stretto.schedule.ir import Schedule
from stretto.schedule.simulate import Span, bubble, makespan, peak_live

_FEWEST_COLUMNS: Final = 10
"""Columns for the time: fewer show nothing."""

_INK: Final = MappingProxyType(
    {
        Op.F: ("░", "forward"),
        Op.B: ("▓", "backward"),
        Op.I: ("▓", "input gradient"),
        Op.W: ("▒", "weight gradient"),
    }
)


def draw(s: Schedule) -> str:
    """The order of every rank, one line each: the text that `Schedule.parse` reads."""
    return str(s)


def gantt(spans: Sequence[Span], *, width: int = 110) -> str:
    """Every rank's computation against time, in at most about `width` columns.

    A block is as long as its action takes and shows the microbatch, with its stage before it where ranks
    hold several (`5:2`) and there is room; blank is a bubble. A label that would hide its whole block is left out.
    """
    blocks = [span for span in spans if span.action.op in COMPUTE and span.end > span.start]
    names = [f"rank {rank}" for rank in range(1 + max(span.rank for span in blocks))]
    with_stage = len({span.action.stage for span in blocks}) > len(names)
    labels = [f"{x.action.stage}:{x.action.mb}" if with_stage else str(x.action.mb) for x in blocks]
    margin = max(map(len, names)) + 2
    scale = _columns_per_unit(blocks, max(map(len, labels)), max(width - margin, _FEWEST_COLUMNS))
    rows = [[" "] * round(makespan(blocks) * scale) for _ in names]
    for span, label in zip(blocks, labels, strict=True):
        left, right = round(span.start * scale), round(span.end * scale)
        short = label if len(label) < right - left else str(span.action.mb)
        rows[span.rank][left:right] = _block(short, _INK[span.action.op][0], right - left)
    legend = [" ".join(_INK[op]) for op in COMPUTE if any(span.action.op is op for span in blocks)]
    live = " ".join(map(str, peak_live(spans)))
    figures = f"time {makespan(spans):g}   bubble {bubble(spans):.1%}   peak activations {live}"
    lines = [
        " " * margin + _ruler(makespan(blocks), scale),
        *((name.ljust(margin) + "".join(row)).rstrip() for name, row in zip(names, rows, strict=True)),
        " " * margin + "   ".join([*legend, figures]),
    ]
    return "\n".join(lines)


def _columns_per_unit(blocks: Sequence[Span], label: int, width: int) -> float:
    """Enough columns for a label inside every block, if they can be had; whole ones, so that blocks match."""
    shortest = min(span.end - span.start for span in blocks)
    scale = min((label + 2) / shortest, width / makespan(blocks))
    return float(int(scale)) if scale >= 1 else scale


def _block(label: str, ink: str, columns: int) -> str:
    return label.center(columns, ink) if len(label) < columns else ink * columns


def _ruler(end: float, scale: float) -> str:
    """Numbers at their place in time, at least 6 columns apart, at steps of 1, 2 or 5 times a power of 10."""
    least = floor(log10(6 / scale))
    step = next(x * 10.0**power for power in (least, least + 1) for x in (1, 2, 5, 10) if x * 10.0**power * scale >= 6)
    marks = range(int(end / step) + 1)
    return "".join(
        f"{k * step:g}".ljust(round((k + 1) * step * scale) - round(k * step * scale)) for k in marks
    ).rstrip()
