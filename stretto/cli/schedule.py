"""`stretto schedule`: list, draw, check and simulate schedules of a pipeline, without a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Final, Literal

from rich.console import Console
from rich.table import Table

from stretto.arguments.form import Form
from stretto.arguments.setting import REQUIRED, setting
from stretto.cli.command import USAGE_ERROR, options
from stretto.cli.schedule_rules import require_bounded, require_read
from stretto.cli.schedule_search import searched, spread
from stretto.cli.schedule_timeline import draw_measured, show
from stretto.console import console
from stretto.layout.stages import placement
from stretto.reading import UnreadableError, read_text, reason
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
from stretto.schedule.generators import stages_on_a_rank
from stretto.schedule.grid import failing, grid
from stretto.schedule.measured import read_cost
from stretto.schedule.picture import chrome_trace, picture
from stretto.terminal import say

_TIMES = "of a stage, in any one unit of time; one number, or one for each stage: 1,1,1,1.5; unset: "


@dataclass(frozen=True)
class Command:
    """List, draw, check, simulate or search schedules of a pipeline: by name, or of a file.

    A file is a table of PyTorch's pipelining (.csv), or a line of actions for each rank.
    """

    what: Literal["list", "draw", "check", "simulate", "search"] = setting(REQUIRED, "what to do", positional=True)
    schedule: tuple[str, ...] = setting(
        (), f"names or files; the names are {', '.join(GENERATORS)}", positional=True, path=True, repeats=True
    )
    pp: int = setting(4, "pipeline ranks", unit="ranks", at_least=1)
    vpp: int | None = setting(None, "stages on each rank; unset: what the schedule has", at_least=1)
    microbatches: int = setting(8, "microbatches of a step", at_least=1)
    forward: tuple[float, ...] | None = setting(None, f"{_TIMES}1 / vpp")
    input_gradient: tuple[float, ...] | None = setting(None, f"{_TIMES}that of a forward")
    weight_gradient: tuple[float, ...] | None = setting(None, f"{_TIMES}that of a forward")
    hop: float = setting(0.0, "latency of a message")
    transfer: float = setting(0.0, "of a message on its link: bytes / bandwidth")
    costs: str | None = setting(
        None, "a file of --schedule-costs, or a measured timeline: instead of these", path=True, named="FILE"
    )
    finish: float = setting(0.0, "norm and update after the last gradient of the step")
    out: tuple[str, ...] = setting(
        (), "draw, search: files: .svg, .png, .json (trace), .csv or .txt", path=True, named="FILE"
    )
    measured: str | None = setting(
        None, "draw: a step that ran, from `stretto train --profile`", path=True, named="FILE"
    )
    memory: float | None = setting(
        None, "search, auto: microbatches whose activations a rank may hold; unset: pp", above=0
    )
    layers: int | None = setting(
        None, "search: split so many layers over the stages too; times are then those of a layer", at_least=1
    )
    head: float = setting(
        0.0,
        "search: all that the head takes, in layers; its gradients are made with the loss, in a forward",
        at_least=0,
    )
    embedding: float = setting(0.0, "search: all that the embedding takes, in layers", at_least=0)
    attention: float | None = setting(
        None,
        "search: attention's share of what a layer takes; layers may then be cut between it and the feed-forward",
        at_least=0,
        at_most=1,
    )
    exact: float | None = setting(None, "search: by a solver as well, for small sizes", unit="seconds", above=0)
    width: int | None = setting(None, "columns of the terminal", at_least=1)


FORMS: Final = (Form("stretto schedule", Command),)


def main(argv: Sequence[str]) -> int:
    """Run `stretto schedule ...`; 0, or 2 for what is no schedule."""
    said: Command = options(FORMS[0], argv)
    screen = console(width=said.width) if said.width else console()
    try:
        run = {"list": _list, "draw": _draw, "check": _check, "simulate": _simulate, "search": _search}
        require_bounded(said)
        require_read(said)
        run[said.what](said, screen)
    except OSError as error:
        say(f"stretto schedule: cannot write {error.filename}: {reason(error)}")
        return USAGE_ERROR
    except (ValueError, ImportError) as error:
        say("\n".join([f"stretto schedule: {error}", *getattr(error, "__notes__", ())]))
        return USAGE_ERROR
    return 0


def read(name: str) -> str:
    """The text of a file. Raises ValueError with its name."""
    try:
        return read_text(Path(name).expanduser(), 2**30)
    except UnreadableError as error:
        raise ValueError(f"cannot read {name}: {error}") from None


def _made(said: Command, name: str) -> Schedule:
    """The schedule of this name or in this file, checked; an error shows where in it."""
    path = Path(name)
    if name in GENERATORS or not path.suffix:
        cost = _cost(said, _unordered(said, name)) if name == "auto" else None
        s = schedule_for(name, said.pp, said.microbatches, said.vpp, cost, memory=said.memory)
    else:
        text = read(name)
        s = from_csv(text) if path.suffix == ".csv" else Schedule.parse(text)
    try:
        check(s)
    except ScheduleError as error:
        error.add_note(grid(s, failing(error)))
        raise
    return s


def _unordered(said: Command, name: str) -> Schedule:
    """Its stages alone, by which there are costs before there is an order."""
    v = stages_on_a_rank(name, said.vpp)
    return Schedule(placement(said.pp, v, GENERATORS[name].shape_of(v)), said.microbatches, [()] * said.pp)


def _cost(said: Command, s: Schedule) -> Cost:
    """What was said; by default all layers of a rank take one unit of time forward, so that vpp does not matter."""
    if said.costs is not None:
        return read_cost(read(said.costs), said.costs, s.num_stages)
    f = spread(said.forward, s.num_ranks / s.num_stages)
    i, w = spread(said.input_gradient, f), spread(said.weight_gradient, f)
    if not any(x for each in (f, i, w) for x in (each if isinstance(each, tuple) else (each,))):
        raise ValueError("--forward, --input-gradient and --weight-gradient are all 0: one of them must take time")
    cost = Cost.split(f, i, w, hop=said.hop, transfer=said.transfer, finish=said.finish)
    if cost.num_stages not in (None, s.num_stages):
        raise ValueError(f"times are given for {cost.num_stages} stages, but there are {s.num_stages}: see --pp, --vpp")
    return cost


def _one(said: Command) -> str:
    if len(said.schedule) != 1:
        raise ValueError(f"{said.what} takes one schedule, got {len(said.schedule)}")
    return str(said.schedule[0])


def _draw(said: Command, screen: Console) -> None:
    if said.measured is not None:
        draw_measured(said, screen, read(said.measured))
        return
    name = _one(said)
    s = _made(said, name)
    timeline = simulate(s, _cost(said, s))
    show(timeline, screen)
    _write(said.out, s, timeline, name)


def _write(files: Sequence[str], s: Schedule, timeline: Timeline, name: str) -> None:
    sizes = _many(s.num_ranks, "rank"), _many(s.num_stages, "stage"), _many(s.num_microbatches, "microbatch")
    title = ", ".join((name, *sizes))
    for path in map(Path, files):
        texts = {".json": lambda: chrome_trace(timeline), ".csv": lambda: to_csv(s), ".txt": lambda: f"{s}\n"}
        if path.suffix in texts:
            path.write_text(texts[path.suffix](), encoding="utf-8")
        else:
            picture(timeline, title=title).save(path)
        say(f"wrote {path}", out=True)


def _many(n: int, what: str) -> str:
    """A number of things."""
    return f"{n} {what}" if n == 1 else f"{n} {what}{'es' if what.endswith('ch') else 's'}"


def _search(said: Command, _: Console) -> None:
    best, cost = searched(said, partial(_cost, said), read)
    made = best.found.schedule
    _write(said.out, made, simulate(made, cost), best.found.origin)


def _check(said: Command, _: Console) -> None:
    s = _made(said, name := _one(said))
    say(
        f"{name}: {s.num_actions:,} actions take {_many(s.num_microbatches, 'microbatch')} through "
        f"{_many(s.num_stages, 'stage')} on {_many(s.num_ranks, 'rank')}; complete, in place, no deadlock",
        out=True,
    )


def _list(said: Command, screen: Console) -> None:
    """All that have as many stages on a rank as times are given for, or as --vpp says."""
    if said.schedule:
        raise ValueError(f"list takes no schedule, got {' '.join(said.schedule)}: simulate compares those")
    given = read_cost(read(said.costs), said.costs).num_stages if said.costs is not None else None
    given = given or max(len(x or ()) for x in (said.forward, said.input_gradient, said.weight_gradient))
    if given > 1 and said.vpp is None:
        if given % said.pp:
            raise ValueError(f"times are given for {given} stages, which is no multiple of --pp {said.pp}")
        said = replace(said, vpp=given // said.pp)
    names = (name for name in GENERATORS if said.vpp in (None, GENERATORS[name].stages) or _any(name))
    _simulate(replace(said, schedule=tuple(names)), screen)


def _any(name: str) -> bool:
    return GENERATORS[name].any_stages


def _simulate(said: Command, screen: Console) -> None:
    names = said.schedule or list(GENERATORS)
    several = len(names) > 1
    columns = "schedule vpp idle bubble free live " if several else "rank stages busy idle bubble activations"
    table = Table(*columns.split(" "), box=None, pad_edge=False, header_style="dim")
    table.columns[0].no_wrap = True
    for name in names:
        s = _made(said, name)
        cost = _cost(said, s)
        timeline = simulate(s, cost)
        if several:
            table.add_row(
                name,
                str(s.num_stages // s.num_ranks),
                *_figures(timeline, s),
                GENERATORS[name].says if name in GENERATORS else "",
            )
            continue
        for rank in range(s.num_ranks):
            stages = ", ".join(str(n) for n, home in enumerate(s.placement) if home == rank)
            table.add_row(str(rank), stages, *_figures(timeline, s, rank))
    screen.print(table)
    if several:
        screen.print(
            f"{_many(said.pp, 'rank')}, {_many(said.microbatches, 'microbatch')}; vpp: stages on a rank; idle: of the "
            "rank that idles most; free: the bubble where no rank waits for the gradient norm (--post-validate); live: "
            "activations, in those of all layers of a rank for one microbatch"
        )
    else:
        end, free = step_time(timeline, cost), step_time(timeline, cost, barrier=False)
        screen.print("activations: in those of all layers of a rank for one microbatch")
        screen.print(f"a step takes {end:g}, or {free:g} where no rank waits for the gradient norm of all")


def _figures(timeline: Timeline, s: Schedule, rank: int | None = None) -> tuple[str, ...]:
    """Busy, idle, the bubble, most activations of a rank; without one, idle and activations of the worst, and bubbles.

    The second bubble is that of ranks that begin the next step each by itself.
    """
    end, first = float(timeline.end.max()), timeline.table.first
    busy = [float((timeline.end - timeline.start)[a:b].sum()) for a, b in pairwise(first)]
    live = [each / (s.num_stages / s.num_ranks) for each in peak_live(timeline)]
    if rank is not None:
        return f"{busy[rank]:g}", f"{end - busy[rank]:g}", f"{1 - busy[rank] / end:.1%}", f"{live[rank]:g}"
    free = 1 - sum(busy) / len(busy) / step_time(timeline, barrier=False)
    return f"{end - min(busy):g}", f"{bubble(timeline):.1%}", f"{abs(free):.1%}", f"{max(live):g}"
