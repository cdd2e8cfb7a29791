"""`stretto checkpoint`: what there is, what is in one, whether it is whole, what differs, what may go.

A directory is one of checkpoints or of a run, or a URL such as s3://bucket/run/checkpoints; where one checkpoint is
wanted, it stands for its newest whole one. Needs neither a GPU nor a process group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from stretto.arguments.form import Form
from stretto.arguments.setting import REQUIRED, setting
from stretto.checkpoint.directory import Retention, Skipped, prunable, remove, way_out
from stretto.checkpoint.errors import RESTORE, CheckpointError
from stretto.checkpoint.index import Index
from stretto.checkpoint.marker import MARKER
from stretto.checkpoint.survey import Entry, changed, checkpoint_of, damage, directory_of, entries, entry, meant
from stretto.cli.command import USAGE_ERROR, chosen, options
from stretto.console import console
from stretto.reading import UnreadableError
from stretto.terminal import say

MOST: Final = 40
"""Lines that are shown of a long list."""


_WHERE = "a directory of checkpoints or of a run, or a URL such as s3://bucket/run/checkpoints"
_ONE = "a checkpoint; or a directory of them or of a run, or a URL: its newest whole one"


@dataclass(frozen=True)
class List:
    """All checkpoints of a directory."""

    directory: str = setting(REQUIRED, _WHERE, positional=True, path=True)


@dataclass(frozen=True)
class Show:
    """What is in one, and which layout wrote it."""

    checkpoint: str = setting(REQUIRED, _ONE, positional=True, path=True)
    tensors: bool = setting(False, "list every tensor")


@dataclass(frozen=True)
class Verify:
    """Read all of it and compare it with its checksums."""

    checkpoint: tuple[str, ...] = setting(REQUIRED, _ONE, positional=True, path=True, repeats=True)
    all: bool = setting(False, "every checkpoint of the directory, not the newest alone")


@dataclass(frozen=True)
class Diff:
    """Tensors and settings that differ between two."""

    a: str = setting(REQUIRED, _ONE, positional=True, path=True)
    b: str = setting(REQUIRED, "another one", positional=True, path=True)
    every: bool = setting(False, f"show all tensors that differ, not {MOST} of them")


@dataclass(frozen=True)
class Prune:
    """Remove those that need not be kept."""

    directory: str = setting(REQUIRED, _WHERE, positional=True, path=True)
    keep: int = setting(REQUIRED, "so many newest whole ones stay")
    keep_every: int = setting(0, "and each whose step is a multiple of this")
    dry_run: bool = setting(False, "say what would go")


FORMS: Final = tuple(
    Form(f"stretto checkpoint {kind.__name__.lower()}", kind) for kind in (List, Show, Verify, Diff, Prune)
)


def main(argv: Sequence[str]) -> int:
    """Run `stretto checkpoint ...`; 0, 1 where checkpoints are damaged or differ, 2 when it cannot be done."""
    form, words = chosen(FORMS, argv)
    run: Mapping[type, Callable[[Any], int]] = {List: _list, Show: _show, Verify: _verify, Diff: _diff, Prune: _prune}
    wanted = options(form, words)
    try:
        return run[form.own](wanted)
    except (CheckpointError, UnreadableError, ValueError) as error:
        say(f"stretto checkpoint: {error}")
        return USAGE_ERROR


def _list(wanted: List) -> int:
    found = entries(directory_of(wanted.directory))
    table = Table("step", "size", "whole", "written by", "name", box=None, pad_edge=False, header_style="dim")
    for each in found:
        whole = "yes" if each.problem is None else "no"
        table.add_row(f"{each.step:,}", size(each.nbytes), whole, each.layout if each.ranks else "", each.path.name)
    console().print(table)
    for each in found:
        if each.problem is not None:
            say(f"{each.path.name}: {each.problem}", out=True)
    return 0


def _show(wanted: Show) -> int:
    path = checkpoint_of(wanted.checkpoint, _pass_over)
    index = Index(path)
    said = entry(path, index.marker.step)
    about = Table(box=None, pad_edge=False, show_header=False)
    about.add_column(style="bold", no_wrap=True)
    about.add_column(overflow="fold")
    for name, text in _about(said, index).items():
        about.add_row(name, text)
    console().print(about)
    if wanted.tensors:
        table = Table("tensor", "shape", "dtype", "size", "pieces", box=None, pad_edge=False, header_style="dim")
        for tensor in index:
            shape = " x ".join(map(str, tensor.shape)) or "one number"
            table.add_row(tensor.name, shape, tensor.dtype, size(tensor.nbytes), f"{len(tensor.pieces)}")
        console().print(table)
    return 0


def _about(said: Entry, index: Index) -> dict[str, str]:
    rows = {
        "checkpoint": f"{said.path}",
        "step": f"{said.step:,}",
        "written by": f"{said.layout}, {said.ranks} ranks",
        "size": f"{size(said.nbytes)} in {len(index.marker.sizes) + 1} files",
    }
    kinds: dict[str, list[int]] = {}
    for tensor in index.tensors.values():
        kinds.setdefault(tensor.name.partition("/")[0], []).append(tensor.nbytes)
    for kind, sizes in kinds.items():
        rows[kind] = f"{len(sizes)} tensors, {size(sum(sizes))}"
    model, optimizer = said.settings.get("model"), said.settings.get("optimizer")
    if isinstance(model, dict):
        rows["of a model"] = ", ".join(f"{k} {v}" for k, v in islice(model.items(), 6) if v is not None)
    if isinstance(optimizer, dict):
        rows["of a run"] = ", ".join(f"{k} {optimizer[k]}" for k in ("optimizer", "lr") if k in optimizer)
    feed = said.extra.get("feed")
    if isinstance(feed, dict):
        rows["place in the data"] = ", ".join(f"{k} {v}" for k, v in feed.items() if isinstance(v, (int, str)))
    return rows


def _verify(wanted: Verify) -> int:
    paths = [p for said in wanted.checkpoint for p in _meant(said, every=wanted.all)]
    bad = 0
    for path in paths:
        wrong = list(islice(damage(path), MOST + 1))
        bad += bool(wrong)
        if not wrong:
            index = Index(path)
            say(f"{path}: whole; {len(index.tensors):,} tensors, {size(index.nbytes)}, as they were written", out=True)
            continue
        say(f"{path}: damaged", out=True)
        for line in wrong[:MOST]:
            say(f"  {line}", out=True)
        if len(wrong) > MOST:
            say("  .. and more", out=True)
        if not any(RESTORE in line for line in wrong):
            say(f"  {way_out(path)}", out=True)
    return 1 if bad else 0


def _meant(said: str, *, every: bool) -> list[Path]:
    """The newest whole one, and before it those that were whole once and are newer; or all."""
    if every:
        return [each.path for each in entries(directory_of(said))]
    found = meant(said)
    damaged = [each.path for each in found.skipped if (each.path / MARKER).exists()]
    for each in found.skipped:
        if each.path not in damaged:  # its save may be under way
            _pass_over(each)
    return [*damaged, *([found.path] if found.path else [])] or [checkpoint_of(said)]  # which raises


def _pass_over(skipped: Skipped) -> None:
    say(f"stretto checkpoint: passing over {skipped}")


def _diff(wanted: Diff) -> int:
    from stretto.checkpoint.compare import differences  # loads torch

    a, b = (checkpoint_of(each, _pass_over) for each in (wanted.a, wanted.b))
    one, other = entry(a, Index(a).marker.step), entry(b, Index(b).marker.step)
    found = list(differences(a, b))
    settings = changed(one.settings, other.settings)
    say(f"{a}: step {one.step:,}, {one.layout}\n{b}: step {other.step:,}, {other.layout}", out=True)
    if found:
        table = Table("tensor", "what", "elements", "largest", box=None, pad_edge=False, header_style="dim")
        for each in found[: None if wanted.every else MOST]:
            far = ("", "") if each.largest is None else (f"{each.elements:,}", f"{each.largest:.3g}")
            table.add_row(each.name, each.what, *far)
        console().print(table)
        more = len(found) - MOST
        if more > 0 and not wanted.every:
            say(f".. and {more:,} more: --every shows them", out=True)
    for path, (before, after) in settings.items():
        say(f"{path}: {before} and {after}", out=True)
    total = len({*Index(a).tensors, *Index(b).tensors})
    say(f"{len(found):,} of {total:,} tensors differ, {len(settings)} settings", out=True)
    return 1 if found else 0


def _prune(wanted: Prune) -> int:
    found = prunable(directory_of(wanted.directory), Retention(wanted.keep, wanted.keep_every))
    for path in found:
        if not wanted.dry_run:
            remove(path)
        say(f"{'would remove' if wanted.dry_run else 'removed'} {path}", out=True)
    if not found:
        say("nothing to remove", out=True)
    return 0


def size(nbytes: int) -> str:
    """Bytes in the largest unit that leaves a whole number."""
    amount, units = float(nbytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount /= 1024
        units.pop(0)
    return f"{amount:.0f} {units[0]}" if units[0] == "B" else f"{amount:.1f} {units[0]}"
