"""Timelines in a terminal, and a step that ran beside the simulated one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from stretto.layout.picture import Colour, readable
from stretto.schedule import Timeline, bubble, gantt, makespan, simulate
from stretto.schedule.measured import Measured
from stretto.schedule.picture import COLOURS, beside, chrome_trace, idle, shade
from stretto.terminal import say

if TYPE_CHECKING:
    from stretto.cli.schedule import Command


def show(timeline: Timeline, screen: Console) -> None:
    """In colours, where the terminal has them."""
    if screen.color_system is None:
        say(gantt(timeline, width=screen.width), out=True)
    else:
        screen.print(coloured(timeline, screen.width), soft_wrap=True)


def draw_measured(said: Command, screen: Console, text: str) -> None:
    """A step that ran over what the simulator makes of its order and costs, and each rank's bubble in both."""
    if said.schedule:
        raise ValueError(f"draw --measured takes the schedule from the file, got {' '.join(said.schedule)} as well")
    assert said.measured is not None
    found = Measured.read(text, said.measured)
    ran, cost = found.typical, found.cost()
    played = simulate(found.schedule, cost)
    for what, timeline in (("measured", ran), ("simulated", played)):
        screen.print(what)
        show(timeline, screen)
    table = Table("rank", "idle, measured", "simulated", box=None, pad_edge=False, header_style="dim")
    for rank, (real, thought) in enumerate(zip(idle(ran), idle(played), strict=True)):
        table.add_row(str(rank), f"{real:.1%}", f"{thought:.1%}")
    table.add_row("all", f"{bubble(ran):.1%}", f"{bubble(played):.1%}")
    screen.print(table)
    real, thought = makespan(ran), makespan(played)
    screen.print(
        f"the median of {len(found.steps)} steps took {1e3 * real:.2f} ms, simulated {1e3 * thought:.2f} ms "
        f"({thought / real - 1:+.1%}); a message took {1e3 * found.hop:.2f} ms"
    )
    s = found.schedule
    title = f"{s.num_ranks} ranks, {s.num_stages} stages, {s.num_microbatches} microbatches"
    for path in map(Path, said.out):
        if path.suffix == ".json":
            path.write_text(chrome_trace(ran, unit=1e6), encoding="utf-8")
        else:
            beside(ran, played, title=title).save(path)
        say(f"wrote {path}", out=True)


def coloured(timeline: Timeline, width: int) -> Text:
    """As `gantt`, in the colours of the pictures: a block shows its microbatch, later stages of a rank are darker."""
    blocks = [span for span in timeline if span.action.op in COLOURS and span.end > span.start]
    names = [f"rank {rank}  " for rank in range(len(timeline.table.first) - 1)]
    shortest, most = min(b.end - b.start for b in blocks), (width - len(names[-1])) / makespan(timeline)
    scale = min(int(most * shortest), 4) / shortest or most  # whole columns, so that blocks match
    text = Text()
    for rank, name in enumerate(names):
        own = [b for b in blocks if b.rank == rank]
        stages = sorted({b.action.stage for b in own})
        text.append(name.ljust(len(names[-1])))
        column = 0
        for b in own:
            left, right = round(b.start * scale), round(b.end * scale)
            fill = shade(COLOURS[b.action.op][0], stages.index(b.action.stage), len(stages))
            label = str(b.action.mb) if len(str(b.action.mb)) <= right - left else ""
            text.append(" " * (left - column)).append(label.center(right - left), _style(fill))
            column = right
        text.append("\n")
    for op, (fill, what) in COLOURS.items():
        if any(b.action.op is op for b in blocks):
            text.append("  ", _style(fill)).append(f" {what}   ")
    return text.append(f"time {makespan(timeline):g}   bubble {bubble(timeline):.1%}")


def _style(fill: Colour) -> Style:
    return Style(color=f"rgb{readable(fill)}".replace(" ", ""), bgcolor=f"rgb{fill}".replace(" ", ""))
