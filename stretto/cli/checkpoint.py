"""Checkpoints of a run: what there is, what is in one, whether it is whole, what differs, what may go.

    stretto checkpoint list runs/latest
    stretto checkpoint show runs/latest --tensors
    stretto checkpoint verify runs/latest/checkpoints/step-00000150
    stretto checkpoint diff runs/a runs/b
    stretto checkpoint prune runs/latest --keep 3 --keep-every 1000 --dry-run

A directory is one of checkpoints or of a run, or a URL such as s3://bucket/run/checkpoints; where one checkpoint is
wanted, it stands for its newest whole one. Needs neither a GPU nor a process group.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Final

from rich.table import Table

from stretto.checkpoint.directory import Retention, prunable, remove
from stretto.checkpoint.errors import CheckpointError
from stretto.checkpoint.index import Index
from stretto.checkpoint.survey import Entry, changed, checkpoint_of, damage, directory_of, entries, entry
from stretto.console import console
from stretto.reading import UnreadableError
from stretto.terminal import said_plainly, say

MOST: Final = 40
"""Lines that are shown of a long list."""


def main(argv: Sequence[str]) -> int:
    """Run `stretto checkpoint ...`; 0, 1 where checkpoints are damaged or differ, 2 when it cannot be done."""
    with said_plainly():
        wanted = _parser().parse_args(list(argv))
    try:
        code: int = wanted.run(wanted)
    except (CheckpointError, UnreadableError, ValueError) as error:
        say(f"stretto checkpoint: {error}")
        return 2
    return code


def _list(wanted: Namespace) -> int:
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


def _show(wanted: Namespace) -> int:
    path = checkpoint_of(wanted.checkpoint)
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


def _verify(wanted: Namespace) -> int:
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
    return 1 if bad else 0


def _meant(said: str, *, every: bool) -> list[Path]:
    return [each.path for each in entries(directory_of(said))] if every else [checkpoint_of(said)]


def _diff(wanted: Namespace) -> int:
    from stretto.checkpoint.compare import differences  # loads torch

    a, b = checkpoint_of(wanted.a), checkpoint_of(wanted.b)
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


def _prune(wanted: Namespace) -> int:
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


def _parser() -> ArgumentParser:
    parser = ArgumentParser("stretto checkpoint", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    each = commands.add_parser("list", help="all checkpoints of a directory")
    each.add_argument("directory")
    each.set_defaults(run=_list)
    each = commands.add_parser("show", help="what is in one, and which layout wrote it")
    each.add_argument("checkpoint")
    each.add_argument("--tensors", action="store_true", help="list every tensor")
    each.set_defaults(run=_show)
    each = commands.add_parser("verify", help="read all of it and compare it with its checksums")
    each.add_argument("checkpoint", nargs="+")
    each.add_argument("--all", action="store_true", help="every checkpoint of the directory, not the newest alone")
    each.set_defaults(run=_verify)
    each = commands.add_parser("diff", help="tensors and settings that differ between two")
    each.add_argument("a")
    each.add_argument("b")
    each.add_argument("--every", action="store_true", help=f"show all tensors that differ, not {MOST} of them")
    each.set_defaults(run=_diff)
    each = commands.add_parser("prune", help="remove those that need not be kept")
    each.add_argument("directory")
    each.add_argument("--keep", type=int, required=True, help="so many newest whole ones stay")
    each.add_argument("--keep-every", type=int, default=0, help="and each whose step is a multiple of this")
    each.add_argument("--dry-run", action="store_true", help="say what would go")
    each.set_defaults(run=_prune)
    return parser
