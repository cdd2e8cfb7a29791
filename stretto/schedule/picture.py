"""A timeline as a picture, in the colours of the zero-bubble papers: F blue, B and I green, W purple."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from types import MappingProxyType
from typing import Final

from stretto.layout.picture import GREY, INK, WHITE, Colour, Picture, Rect, Words, blend, readable
from stretto.schedule.actions import COMPUTE, Op
from stretto.schedule.simulate import Span, Timeline, bubble, makespan, peak_live

COLOURS: Final = MappingProxyType(
    {
        Op.F: ((92, 141, 214), "forward"),
        Op.B: ((66, 158, 124), "backward"),
        Op.I: ((118, 196, 160), "input gradient"),
        Op.W: ((165, 131, 201), "weight gradient"),
    }
)
_LEFT, _TOP, _ROW, _GAP = 70.0, 46.0, 30.0, 6.0


def picture(spans: Sequence[Span], *, title: str = "", width: float = 1200.0, until: float | None = None) -> Picture:
    """Every rank's computation against time; a block shows its microbatch, and later stages of a rank are darker.

    What is blank is a bubble. At the right of each rank: how much of the time it idles, and its most activations. The
    width stands for the time `until`, by default that of the last action.
    """
    blocks = [span for span in spans if span.action.op in COMPUTE and span.end > span.start]
    ranks, end = 1 + max(span.rank for span in spans), makespan(spans)
    right = 150.0
    scale = (width - _LEFT - right) / (until or end)
    stages = [sorted({b.action.stage for b in blocks if b.rank == rank}) for rank in range(ranks)]
    live, height = peak_live(spans), _TOP + ranks * (_ROW + _GAP) + 40
    shapes: list[Rect | Words] = [Words(_LEFT, 22, title, 15, bold=True)]
    for rank in range(ranks):
        y = _TOP + rank * (_ROW + _GAP)
        busy = sum(b.end - b.start for b in blocks if b.rank == rank)
        figures = f"{1 - busy / end:.1%} idle, {live[rank]} live"
        shapes += [
            Words(_LEFT - 10, y + _ROW / 2, f"rank {rank}", 12, GREY, anchor="end"),
            Rect(_LEFT, y, end * scale, _ROW, (245, 246, 248)),
            Words(width - right + 12, y + _ROW / 2, figures, 12, GREY),
        ]
    for b in blocks:
        turn = stages[b.rank].index(b.action.stage)
        fill = shade(COLOURS[b.action.op][0], turn, len(stages[b.rank]))
        x, y, wide = _LEFT + b.start * scale, _TOP + b.rank * (_ROW + _GAP), (b.end - b.start) * scale
        shapes.append(Rect(x, y, wide, _ROW, fill, edge=WHITE, stroke=0.8 if wide > 3 else 0.0))
        if wide > 7 * len(str(b.action.mb)) + 2:
            shapes.append(Words(x + wide / 2, y + _ROW / 2, str(b.action.mb), 11, readable(fill), anchor="middle"))
    return Picture(width, height, (*shapes, *_legend(blocks, spans, height - 18)))


def beside(measured: Timeline, simulated: Timeline, *, title: str = "", width: float = 1200.0) -> Picture:
    """A measured step over the simulated one, on one scale of time."""
    until = max(makespan(measured), makespan(simulated))
    above = picture(measured, title=f"measured: {title}", width=width, until=until)
    below = picture(simulated, title=f"simulated: {title}", width=width, until=until)
    moved = (replace(shape, y=shape.y + above.height) for shape in below.shapes)
    return Picture(width, above.height + below.height, (*above.shapes, *moved))


def idle(timeline: Timeline) -> list[float]:
    """The part of the time that each rank idles, until the last action of any ends: 0 to 1."""
    end, taken = makespan(timeline), timeline.end - timeline.start
    return [1 - float(taken[a:b].sum()) / end for a, b in pairwise(timeline.table.first.tolist())]


def _legend(blocks: Sequence[Span], spans: Sequence[Span], y: float) -> list[Rect | Words]:
    x, shapes = _LEFT, list[Rect | Words]()
    for op in COMPUTE:
        if any(b.action.op is op for b in blocks):
            fill, name = COLOURS[op]
            shapes += [Rect(x, y - 6, 12, 12, fill, 2), Words(x + 18, y, name, 12)]
            x += 40 + 7 * len(name)
    key = "number: microbatch; darker: a later stage of the rank; live: most activations, each a microbatch of a stage"
    figures = f"time {makespan(spans):.6g}, bubble {bubble(spans):.1%}"
    shapes.append(Words(x + 12, y, f"{figures}; {key}", 12, GREY))
    return shapes


def shade(colour: Colour, turn: int, turns: int) -> Colour:
    """The colour for a stage: the `turn`-th of so many on its rank."""
    return blend(colour, INK, 0.55 * turn / turns)


def chrome_trace(spans: Sequence[Span], *, unit: float = 1000.0) -> str:
    """The timeline for chrome://tracing or Perfetto: a thread for each rank, `unit` microseconds for one of time."""
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}}
        for rank in range(1 + max(span.rank for span in spans))
    ]
    events += [
        {
            "ph": "X",
            "name": str(span.action),
            "cat": COLOURS[span.action.op][1],
            "pid": 0,
            "tid": span.rank,
            "ts": span.start * unit,
            "dur": (span.end - span.start) * unit,
            "args": {"stage": span.action.stage, "microbatch": span.action.mb},
        }
        for span in spans
        if span.action.op in COMPUTE
    ]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
