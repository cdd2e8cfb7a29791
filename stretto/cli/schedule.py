"""Schedules of a pipeline: list, draw, check and simulate them, without a device.

    stretto schedule list --pp 4 --microbatches 8
    stretto schedule draw zbv --pp 4 --microbatches 8 --out zbv.svg
    stretto schedule draw --measured runs/latest/profile/timeline.json --out step.svg
    stretto schedule simulate 1f1b zbv --pp 8 --microbatches 32 --weight-gradient 0.7
    stretto schedule check mine.csv
    stretto schedule search --pp 4 --microbatches 8 --memory 2 --exact 30

A schedule is one by name, or a file: a table of PyTorch's pipelining (.csv), or a line of actions for each rank.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from stretto.cli.schedule_timeline import draw_measured, show
from stretto.console import console
from stretto.layout import Shape
from stretto.schedule import (
    GENERATORS,
    Cost,
    Schedule,
    ScheduleError,
    Timeline,
    bubble,
    check,
    peak_live,
    schedule_for,
    simulate,
    step_time,
)
from stretto.schedule.csv import from_csv, to_csv
from stretto.schedule.exact import solve
from stretto.schedule.grid import failing, grid
from stretto.schedule.measured import read_cost
from stretto.schedule.picture import chrome_trace, picture
from stretto.schedule.search import Found, search
from stretto.terminal import say

USAGE_ERROR = 2
_PLACEMENTS: Final[tuple[tuple[int, Shape], ...]] = ((1, "loop"), (2, "loop"), (2, "v"), (3, "loop"), (4, "loop"))
ABOUT: Final = {
    "1f1b": "one forward, one backward in turn",
    "auto": "the quickest in a V that a search finds",
    "depth-first": "interleaved in groups of exactly pp microbatches",
    "dualpipev": "DualPipe in a V: a forward beside a backward",
    "gpipe": "all forwards, then all backwards",
    "interleaved": "1f1b over several stages a rank",
    "interleaved-zb": "interleaved with weight gradients put where a rank idles",
    "looped-bfs": "gpipe over several stages a rank",
    "v-half": "half the activations of 1f1b",
    "v-min": "a third of the activations of 1f1b",
    "zb-h1": "1f1b with weight gradients put where a rank idles",
    "zb-h2": "zero bubble for twice the activations",
    "zbv": "zero bubble in a V, at the activations of 1f1b",
}


def main(argv: Sequence[str]) -> int:
    """Run `stretto schedule ...`; 0, or 2 for what is no schedule."""
    said = _parser().parse_args(argv)
    screen = console(width=said.width) if said.width else console()
    try:
        run = {"list": _list, "draw": _draw, "check": _check, "simulate": _simulate, "search": _search}
        run[said.what](said, screen)
    except (ValueError, OSError, ImportError) as error:
        say("\n".join([f"stretto schedule: {error}", *getattr(error, "__notes__", ())]))
        return USAGE_ERROR
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser("stretto schedule", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["list", "draw", "check", "simulate", "search"])
    parser.add_argument("schedule", nargs="*", help=f"names or files; the names are {', '.join(GENERATORS)}")
    parser.add_argument("--pp", type=int, default=4, help="pipeline ranks (4)")
    parser.add_argument("--vpp", type=int, help="stages on each rank; left out: what the schedule has")
    parser.add_argument("--microbatches", type=int, default=8, help="microbatches (8)")
    costs = parser.add_argument_group("costs, in any one unit of time; one number, or one for each stage: 1,1,1,1.5")
    costs.add_argument("--forward", type=_times, help="of a stage; left out: 1 / vpp")
    costs.add_argument("--input-gradient", type=_times, help="left out: that of a forward")
    costs.add_argument("--weight-gradient", type=_times, help="left out: that of a forward")
    costs.add_argument("--hop", type=float, default=0.0, help="latency of a message")
    costs.add_argument("--transfer", type=float, default=0.0, help="of a message on its link: bytes / bandwidth")
    costs.add_argument(
        "--costs", type=Path, help="a file of --schedule-costs, or a measured timeline: instead of these"
    )
    costs.add_argument("--finish", type=float, default=0.0, help="norm and update after the last gradient of the step")
    parser.add_argument("--out", type=Path, action="append", default=[], help=".svg, .png, .json (trace), .csv or .txt")
    parser.add_argument("--measured", type=Path, help="draw: a step that ran, from `stretto train --profile`")
    parser.add_argument("--memory", type=float, help="search: microbatches whose activations a rank may hold (pp)")
    parser.add_argument("--exact", type=float, metavar="SECONDS", help="search: by a solver as well, for small sizes")
    parser.add_argument("--width", type=int, help="columns of the terminal")
    return parser


def _times(text: str) -> float | tuple[float, ...]:
    numbers = tuple(map(float, text.split(",")))
    return numbers if len(numbers) > 1 else numbers[0]


def _made(said: Namespace, name: str) -> Schedule:
    """The schedule of this name or in this file, checked; an error shows where in it."""
    path = Path(name)
    if name in GENERATORS or not path.suffix:
        s = schedule_for(name, said.pp, said.microbatches, said.vpp)
    else:
        text = path.read_text(encoding="utf-8")
        s = from_csv(text) if path.suffix == ".csv" else Schedule.parse(text)
    try:
        check(s)
    except ScheduleError as error:
        error.add_note(grid(s, failing(error)))
        raise
    return s


def _cost(said: Namespace, s: Schedule) -> Cost:
    """What was said; by default all layers of a rank take one unit of time forward, so that vpp does not matter."""
    if said.costs is not None:
        return read_cost(said.costs.read_text(encoding="utf-8"), str(said.costs), s.num_stages)
    f = said.forward if said.forward is not None else s.num_ranks / s.num_stages
    i = said.input_gradient if said.input_gradient is not None else f
    w = said.weight_gradient if said.weight_gradient is not None else f
    return Cost.split(f, i, w, hop=said.hop, transfer=said.transfer, finish=said.finish)


def _one(said: Namespace) -> str:
    if len(said.schedule) != 1:
        raise ValueError(f"{said.what} takes one schedule, got {len(said.schedule)}")
    return str(said.schedule[0])


def _draw(said: Namespace, screen: Console) -> None:
    if said.measured is not None:
        draw_measured(said, screen)
        return
    name = _one(said)
    s = _made(said, name)
    timeline = simulate(s, _cost(said, s))
    show(timeline, screen)
    _write(said.out, s, timeline, name)


def _write(paths: Sequence[Path], s: Schedule, timeline: Timeline, name: str) -> None:
    title = f"{name}, {s.num_ranks} ranks, {s.num_stages} stages, {s.num_microbatches} microbatches"
    for path in paths:
        texts = {".json": lambda: chrome_trace(timeline), ".csv": lambda: to_csv(s), ".txt": lambda: f"{s}\n"}
        if path.suffix in texts:
            path.write_text(texts[path.suffix](), encoding="utf-8")
        else:
            picture(timeline, title=title).save(path)
        say(f"wrote {path}", out=True)


def _search(said: Namespace, _: Console) -> None:
    """Over the placements, or those of --vpp, or those for which costs are given."""
    if said.schedule:
        raise ValueError(f"search takes no schedule, got {' '.join(said.schedule)}")
    memory, found = said.memory if said.memory is not None else said.pp, list[tuple[Found, str]]()
    for v, shape in _PLACEMENTS:
        place = Schedule([0] * said.pp * v, said.microbatches, [()] * said.pp)
        cost = _cost(said, place)
        if said.vpp not in (None, v) or cost.num_stages not in (None, said.pp * v):
            continue
        cap = [int(memory * v + 1e-9)] * said.pp
        try:
            best = search(said.pp, v, said.microbatches, cost, cap, shape)
            if said.exact is not None:
                best = solve(said.pp, v, said.microbatches, cost, cap, shape, seconds=said.exact)
        except ScheduleError as error:
            say(f"passed over: {error}", out=True)
            continue
        where = f"{v} stage{'s' * (v > 1)} a rank in a {shape}"
        found.append((best, where))
        say(
            f"{where}: {best.origin}, a step takes {best.time:g}, at most {best.gap:.1%} above the best there is",
            out=True,
        )
    if not found:
        raise ValueError("no schedule was found: allow more --memory, or another --vpp")
    best, where = min(found, key=lambda each: each[0].time)
    say(f"quickest: {where}, {best.origin}", out=True)
    _write(said.out, best.schedule, simulate(best.schedule, _cost(said, best.schedule)), best.origin)


def _check(said: Namespace, _: Console) -> None:
    s = _made(said, name := _one(said))
    say(
        f"{name}: {s.num_actions:,} actions take {s.num_microbatches} microbatches through {s.num_stages} stages on "
        f"{s.num_ranks} ranks; complete, in place, no deadlock",
        out=True,
    )


def _list(said: Namespace, screen: Console) -> None:
    said.schedule = [name for name in GENERATORS if said.vpp in (None, GENERATORS[name].stages) or _any(name)]
    _simulate(said, screen)


def _any(name: str) -> bool:
    return GENERATORS[name].any_stages


def _simulate(said: Namespace, screen: Console) -> None:
    names = said.schedule or list(GENERATORS)
    several = len(names) > 1
    columns = ("schedule" if several else "rank", *(("stages a rank", "") if several else ("stages",)))
    table = Table(*columns, "busy", "idle", "bubble", "activations", box=None, pad_edge=False, header_style="dim")
    for name in names:
        s = _made(said, name)
        cost = _cost(said, s)
        timeline = simulate(s, cost)
        if several:
            table.add_row(name, str(s.num_stages // s.num_ranks), ABOUT.get(name, ""), *_figures(timeline, s))
            continue
        for rank in range(s.num_ranks):
            stages = ", ".join(str(n) for n, home in enumerate(s.placement) if home == rank)
            table.add_row(str(rank), stages, *_figures(timeline, s, rank))
    screen.print(table)
    if several:
        screen.print(
            f"{said.pp} ranks, {said.microbatches} microbatches; idle: of the rank that idles most, until the last "
            "action of any; activations: of all layers of a rank for one microbatch, at the rank with most"
        )
    else:
        end, free = step_time(timeline, cost), step_time(timeline, cost, barrier=False)
        screen.print(f"a step takes {end:g}, or {free:g} where no rank waits for the gradient norm of all")


def _figures(timeline: Timeline, s: Schedule, rank: int | None = None) -> tuple[str, str, str, str]:
    """Busy, idle, share of the time that is idle, most activations: of one rank, or of the worst."""
    end, first = float(timeline.end.max()), timeline.table.first
    busy = [float((timeline.end - timeline.start)[a:b].sum()) for a, b in pairwise(first)]
    live, per_rank = peak_live(timeline), s.num_stages / s.num_ranks
    if rank is not None:
        return f"{busy[rank]:g}", f"{end - busy[rank]:g}", f"{1 - busy[rank] / end:.1%}", f"{live[rank] / per_rank:g}"
    return f"{min(busy):g}", f"{end - min(busy):g}", f"{bubble(timeline):.1%}", f"{max(live) / per_rank:g}"
