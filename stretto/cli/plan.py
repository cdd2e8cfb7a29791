"""`stretto plan`: layouts that fit, the quickest first, from arguments alone: no workers, no device, no torch."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from types import MappingProxyType
from typing import Final, Literal

from rich.table import Table
from rich.text import Text

from stretto.arguments import ConfigError, Resolved
from stretto.arguments.errors import as_text
from stretto.arguments.schema import RunConfig
from stretto.arguments.setting import Value, setting
from stretto.arguments.sources import SourceKind
from stretto.arguments.tree import settings
from stretto.cli.command import USAGE_ERROR
from stretto.cli.hosts import limit_of_host
from stretto.cli.memory import GIB
from stretto.cli.words import of_run, origin, parse_or_demo, with_vocabulary
from stretto.console import console
from stretto.data.errors import DataError
from stretto.estimate.chips import CHIPS
from stretto.estimate.planner import SIZES, Found, Limits, Plan, plan
from stretto.terminal import say

_VARIED: Final = (*SIZES, "parallel.schedule", "parallel.sharding", "run.recompute")
_SMALLEST: Final = MappingProxyType({"tp": "1", "cp": "1", "pp": "1", "ep": "1", "etp": "1", "dp": "auto"})
"""Where to begin when the layout of a preset does not go with the other words: what presets say of it is not fixed."""


@dataclass(frozen=True)
class Options:
    """Rank the layouts of a run that fit a device by the time of a step. What the words set stays as it is."""

    hbm: float = setting(131.0, "memory of a device that a run may fill", unit="GiB", above=0)
    host_memory: float | None = setting(
        None, "memory of a host; unset: of this one, where it has GPUs, else any", unit="GiB", above=0
    )
    chip: Literal["h100", "h200"] = setting("h200", "whose rates count: as measured in training steps, at 700 W")
    top: int = setting(10, "layouts to show, at most two that cut the model alike", at_least=1)


FORMS: Final = (of_run("plan", Options),)


def main(argv: Sequence[str]) -> int:
    """Run `stretto plan ...`; 0, 1 when nothing fits, or 2 when the settings are no valid run."""
    try:
        resolved, free = _resolved(argv)
        _require_rates(resolved.args.run)
    except (ConfigError, DataError, ValueError) as error:
        say(f"stretto plan: {error}")
        return USAGE_ERROR
    args, own = resolved.args, resolved.own
    said = {SourceKind.COMMAND_LINE, SourceKind.FILE}
    chosen = (path for path, source in resolved.sources.items() if source.kind in said)
    fixed = frozenset(path for path in chosen if path.removeprefix("parallel.") not in free)
    host = limit_of_host(args, own.host_memory)
    limits = Limits(own.hbm * GIB, inf if host is None else host)
    found = plan(args, resolved.also, fixed, CHIPS[own.chip], limits, most=own.top)
    screen = console()
    if (preset := origin(resolved)) is not None:
        screen.print(Text.assemble(("preset ", "bold"), preset))
    fit = f"{found.fitting:,} of which fit{'s' * (found.fitting == 1)} into {own.hbm:g} GiB"
    fit += f", hosts of {host / GIB:,.0f} GiB" if found.host is not None and host is not None else ""
    layouts = f"{found.tried:,} layout{'s' * (found.tried != 1)}"
    screen.print(f"{layouts} of {args.run.nproc or 1} {own.chip.upper()}s, {fit}; tokens/s of one")
    kept = [settings()[path].flag for path in _VARIED if path in fixed]
    if kept:
        screen.print(f"not varied, as they are set: {', '.join(kept)}")
    if not found.fit:
        screen.print(_nothing(found, own.hbm, host))
        return 1
    screen.print(_table(found.fit))
    screen.print(f"The first in ms: {found.fit[0].time.said}. It adds to the command line:")
    screen.print(Text(f"  {shlex.join(_words(found.fit[0].settings))}"), soft_wrap=True)
    screen.print("Estimates: docs/planning.md has such beside measured steps.")
    return 0


def _resolved(argv: Sequence[str]) -> tuple[Resolved, Mapping[str, str]]:
    """The run that is said; and where as it stands it is none, one whose axes are smallest, with those that are."""
    named = {word.partition("=")[0] for word in argv}
    words = [*argv, *([] if named & {"--device", "-h", "--help"} else ["--device", "cuda"])]
    try:
        return with_vocabulary(parse_or_demo(words, files=False, form=FORMS[0])), {}
    except ConfigError as error:
        if named & {"--config", "--set", "--megatron"}:  # files and paths may name axes, too
            raise
        first = error
    free = {axis: size for axis, size in _SMALLEST.items() if f"--{axis}" not in named}
    smallest = [word for axis, size in free.items() for word in (f"--{axis}", size)]
    try:
        return with_vocabulary(parse_or_demo([*words, *smallest], files=False, form=FORMS[0])), free
    except ConfigError as error:  # where the smallest axes bring problems of their own, these were not at fault
        raise min(error, first, key=lambda each: len(each.violations)) from None


def _require_rates(run: RunConfig) -> None:
    """Raise ValueError for a run that no rate was measured of."""
    needed = {"dtype": "bf16", "device": "cuda"}
    wrong = {name: there for name, there in needed.items() if getattr(run, name) != there}
    if wrong:
        here = ", ".join(f"{name} = {getattr(run, name)}" for name in wrong)
        ways = " ".join(f"--{name} {there}" for name, there in wrong.items())
        raise ValueError(f"rates are those of GPUs in bf16 or FP8, but {here}; try {ways}")


def _words(chosen: Mapping[str, Value]) -> list[str]:
    """As the command line has them; what is a switch without its value."""
    words = []
    for path, value in chosen.items():
        words += [settings()[path].flag] if value is True else [settings()[path].flag, as_text(value)]
    return words


def _table(plans: Sequence[Plan]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("ms", "tokens/s", "GiB"):
        table.add_column(name, justify="right")
    for name in ("layout", "schedule", "sharding", "micro", "recompute"):
        table.add_column(name)
    for each in plans:
        p = each.args.parallel
        axes = [f"{axis}={n}" for axis in ("tp", "cp", "pp", "dp", "ep") if (n := getattr(p, axis)) > 1] or ["one"]
        schedule = f"{p.schedule} x {p.vpp}" if (p.vpp or 1) > 1 else p.schedule
        table.add_row(
            f"{each.time.total * 1e3:,.0f}",
            f"{each.rate:,.0f}",
            f"{each.memory / GIB:.1f}",
            " ".join(axes),
            schedule if p.pp > 1 else "",
            p.mode,
            str(each.args.batch.micro_batch),
            each.args.run.recompute,
        )
    return table


def _nothing(found: Found, limit: float, host: float | None) -> str:
    if found.host is not None and host is not None:
        return (
            f"nothing fits: devices would do, but hosts have {host / GIB:.1f} GiB: {shlex.join(_words(found.host[0]))} "
            f"needs least, {found.host[1].total / GIB:.1f}: {found.host[1].said}; try fewer ranks on each host "
            "(--gpus-per-node), --no-async-save, or --no-optimizer-cpu-offload"
        )
    if found.leanest is None:
        return "no layout passes the rules: fewer settings on the command line leave more to choose"
    lacks = found.leanest.memory / GIB - limit
    return (
        f"nothing fits: {shlex.join(_words(found.leanest.settings))} lacks least, {lacks:.1f} GiB; try more GPUs "
        "(--nproc), a shorter --seq-len, --cp, --optimizer-cpu-offload, --masters remainder, or --moments bf16"
    )
