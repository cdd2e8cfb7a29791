"""`stretto verify`: prove that a layout gives what one process gives, or another layout."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Final

from stretto.arguments import ConfigError, Resolved
from stretto.arguments.elsewhere import AXES, validated_in
from stretto.arguments.errors import Violation, as_text
from stretto.arguments.setting import setting
from stretto.arguments.tree import get
from stretto.cli.command import USAGE_ERROR
from stretto.cli.megatron import layer
from stretto.cli.usage_error import reject
from stretto.cli.words import newest_record, of_run, origin, parse_or_demo, with_vocabulary
from stretto.data.errors import DataError
from stretto.initialize.environment import LaunchError, detect
from stretto.layout import Layout
from stretto.terminal import say


@dataclass(frozen=True)
class Options:
    """Prove that a layout gives what one process gives, or another layout."""

    against: str = setting(
        "",
        "what to compare with, as in tp=2,pp=2; unset: one process, or with exact one for each of dp",
        named="LAYOUT",
    )
    updates: int = setting(
        2, "optimizer steps to compare: the second begins from weights that the first has changed", at_least=1
    )
    json: str | None = setting(None, "write every difference, and the verdict, to a file", path=True, named="FILE")
    comms: bool = setting(
        False, "compare what a training step sends, axis by axis, with what it should, and rank with rank"
    )


FORMS: Final = (of_run("verify", Options),)


def main(argv: Sequence[str]) -> int:
    """Run `stretto verify ...`, which takes the words of `stretto train` too: 0 equal, 1 different, 2 a wrong word."""
    try:
        launch = detect(os.environ)
    except LaunchError as error:
        say(f"stretto verify: {error}")
        return USAGE_ERROR
    alone = launch.source == "python"
    try:
        world = None if alone else launch.size
        translate = partial(layer, tell=launch.rank == 0, processes=world)
        resolved = with_vocabulary(
            parse_or_demo(
                argv, world_size=world, files=False, form=FORMS[0], translate=translate, checkpoint=newest_record
            )
        )
        own: Options = resolved.own
        args = resolved.args
        if args.optimizer.param_groups or args.tuning.freeze or args.run.activation_budget is not None:
            from stretto.train.build import require_buildable

            require_buildable(args)
        work = _recorded(own, resolved) if own.comms else _work(own, resolved)
    except (ConfigError, DataError, ValueError) as error:
        return reject(error, launch, command="stretto verify")
    if launch.rank == 0 and (preset := origin(resolved)) is not None:
        say(f"preset {preset}", out=True)
    from stretto.launch.local import run_local

    nproc = resolved.args.run.nproc or 1
    return run_local(nproc, work) if alone and nproc > 1 else work()


def _recorded(own: Options, resolved: Resolved) -> Callable[[], int]:
    """A step whose communications are recorded. Raises ValueError for options that would have no effect."""
    from stretto.cli.comms import Task as Recorded

    said = [f"--{f.name}" for f in fields(own) if f.name != "comms" and getattr(own, f.name) != f.default]
    if said:
        raise ValueError(f"{', '.join(said)}: no effect with --comms, which compares with no other run")
    return Recorded(resolved)


def _layout_of(text: str) -> Layout:
    """The layout that `tp=2,pp=2` names. Raises ValueError for what is no axis or no size."""
    size = dict.fromkeys(AXES, 1)
    said = [part.partition("=")[::2] for part in text.split(",") if part]
    if any(axis not in size or not n.isdecimal() for axis, n in said) or len(dict(said)) != len(said):
        raise ValueError(f"{text!r} is no layout: write sizes of {', '.join(AXES)} as in tp=2,pp=2, each once")
    size |= {axis: int(n) for axis, n in said}
    return Layout.of(tp=size["tp"], cp=size["cp"], dp=size["dp"], pp=size["pp"], ep=size["ep"], etp=size["etp"])


def reference_of(against: str, resolved: Resolved) -> Layout:
    """What a run is compared with: the layout that is named, else one process; of an exact run as many as it has
    replicas, since its bits are those of every tp and pp beside the same dp. Raises ValueError as `_layout_of`."""
    p = resolved.args.parallel
    if against or p.exact is None:
        return _layout_of(against)
    return replace(p, tp=1, pp=1, vpp=None, vpp_shape=None, schedule="1f1b").layout


def _work(own: Options, resolved: Resolved) -> Task:
    """Both layouts, judged. Raises ConfigError or ValueError for one that cannot be."""
    reference = reference_of(own.against, resolved)
    if reference.world > resolved.layout.world:
        raise ValueError(
            f"--against {own.against} has {reference.world} ranks, the run {resolved.layout.world}: swap them, "
            "or compare with a layout of no more ranks"
        )
    try:
        validated_in(resolved.args, reference)
    except ConfigError as error:
        name = f"--against {own.against or reference}"
        raise ConfigError([_of_reference(v, resolved, reference, name) for v in error.violations]) from None
    report = Path(own.json).expanduser() if own.json is not None else None
    if report is not None and (report.is_dir() or not report.parent.is_dir()):
        raise ValueError(f"--json {report}: there is no directory {report.parent}, or that is one")
    return Task(resolved, reference, own.updates, report)


def _of_reference(v: Violation, resolved: Resolved, reference: Layout, name: str) -> Violation:
    """What is wrong with the reference: its sizes are its own, all else is as in the run."""
    sizes = {f"parallel.{axis}": reference.size(axis) for axis in AXES} | {"run.nproc": reference.world}
    given = tuple(
        f"{path} = {sizes[path]} ({name})"
        if path in sizes
        else f"{path} = {as_text(get(resolved.args, path))} ({resolved.sources[path]})"
        for path in v.fields
    )
    fixes = tuple(fix for fix in v.fixes if not set(fix) & set(sizes))
    return replace(v, problem=f"{name}: {v.problem}", given=given, fixes=fixes, hint="or compare with another layout")


@dataclass(frozen=True)
class Task:
    """What each worker does."""

    resolved: Resolved
    reference: Layout
    updates: int
    json: Path | None

    def __call__(self) -> int:
        """Compare; the first rank says what was found."""
        from stretto.console import console
        from stretto.initialize import initialize
        from stretto.report.comparison import as_data, comparison
        from stretto.verify import against_reference

        args, layout = self.resolved.args, self.resolved.layout
        with initialize(
            device=args.run.device, timeout=args.run.timeout, threads=args.threads, deterministic=args.deterministic
        ) as world:
            found = against_reference(args, layout, world, reference=self.reference, steps=self.updates)
        if world.rank == 0:
            console().print(comparison(found, args, self.reference))
            if self.json is not None:
                self.json.write_text(
                    json.dumps(as_data(found, args, self.reference), indent=1) + "\n", encoding="utf-8"
                )
        return 0 if found.equal else 1
