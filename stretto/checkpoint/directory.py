"""The directory of a run's checkpoints: names, the newest whole one, and what may be removed.

A checkpoint is written in place and is none until its marker is there. To write a step again, the former
checkpoint of that step moves aside first (`step-00000150.replaced`), and still counts until the new one
is whole.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from shlex import quote

from stretto.checkpoint.errors import RESTORE, CheckpointError
from stretto.checkpoint.marker import MARKER, inspect
from stretto.checkpoint.places import is_local, place, remove_tree, sync_directory

_NAME = re.compile(r"step-(\d{8,})(\.replaced)?")


@dataclass(frozen=True)
class Skipped:
    """A directory that looks like a newer checkpoint and is not a whole one."""

    path: Path
    reason: str

    def __str__(self) -> str:
        """What it is, and why; named once."""
        return self.reason if self.reason.startswith(str(self.path)) else f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint, or None; and the newer ones passed over on the way to it."""

    path: Path | None
    skipped: tuple[Skipped, ...] = ()

    @property
    def checkpoint(self) -> Path:
        """The checkpoint; CheckpointError where there is none."""
        if self.path is None:
            passed = "".join(f"; {each}" for each in self.skipped)
            raise CheckpointError(f"no whole checkpoint was found{passed}")
        return self.path


def step_path(directory: Path, step: int) -> Path:
    """`<directory>/step-00000150`; sorts by step as text."""
    return directory / f"step-{step:08d}"


def latest_complete(directory: str | Path) -> Found:
    """The newest whole checkpoint in `directory`, judged without reading tensors.

    With several ranks, let one of them look and tell the others: two may see a shared disk differently.
    """
    skipped = []
    for path in checkpoints(directory):
        try:
            inspect(path)
        except CheckpointError as error:
            skipped.append(Skipped(path, str(error)))
        else:
            return Found(path, tuple(skipped))
    return Found(None, tuple(skipped))


def way_out(damaged: Path) -> str:
    """What to do about a checkpoint that looks whole and is not: the whole one before it, and how to go on from it."""
    before = [path for path in checkpoints(damaged.parent) if _NAME.fullmatch(damaged.name) and path != damaged]
    earlier = next((path for path in before if step_of(path) <= step_of(damaged) and _whole(path)), None)
    if earlier is None:
        return f"{RESTORE}; no checkpoint before it is whole"
    aside = f"mv {quote(str(damaged))} {quote(f'{damaged}.damaged')}" if is_local(damaged) else f"remove {damaged}"
    return f"{RESTORE}, or go on from step {step_of(earlier):,}: {aside}, and the newest whole checkpoint is {earlier}"


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `keep`, and besides them each whose step is a multiple of `keep_every`."""

    keep: int = 1
    keep_every: int = 0

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep={self.keep}: at least the newest checkpoint must stay; use keep=1 or more")
        if self.keep_every < 0:
            raise ValueError(f"keep_every={self.keep_every}: a number of steps, or 0 for no checkpoint of this kind")

    def always(self, step: int) -> bool:
        """Whether the checkpoint of a step stays, however old it is."""
        return bool(self.keep_every and step % self.keep_every == 0)


def prune(directory: str | Path, keep: int, keep_every: int = 0) -> tuple[Path, ...]:
    """Remove whole checkpoints that `Retention` does not keep, and unfinished ones older than the newest whole one.

    A checkpoint that was completed and is damaged now is left for a person to look at, and not counted. An
    unfinished one newer than all whole ones is left too: it may be being written. Call it on one rank, after
    `save`.

    Returns:
        What was removed.
    """
    removed = prunable(directory, Retention(keep, keep_every))
    for path in removed:
        remove(path)
    return removed


def prunable(directory: str | Path, stays: Retention) -> tuple[Path, ...]:
    """What `prune` would remove, newest first."""
    steps: list[int] = []
    newest = 0
    found = []
    for path in checkpoints(directory):
        if path.is_symlink():  # what it points to lies elsewhere, and is not ours to remove
            continue
        step, finished = step_of(path), (path / MARKER).exists()
        if finished and _whole(path) and step not in steps and (newest < stays.keep or stays.always(step)):
            steps.append(step)
            newest += 1
        elif steps and (_whole(path) or not finished):
            found.append(path)
    return tuple(found)


def prepare(path: Path) -> None:
    """Have an empty directory to write into; a whole checkpoint of the same step moves aside."""
    aside = _aside(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_local(path) and os.path.lexists(path) and (path.is_symlink() or not path.is_dir()):
        # Not ours to remove; and the save is due.
        stray = next(p for n in count(1) if not os.path.lexists(p := path.with_name(f"{path.name}.stray-{n}")))
        path.rename(stray)
        logging.getLogger(__name__).warning("%s was no checkpoint and is in the way of one: moved to %s", path, stray)
    if is_local(path) and path.exists() and _whole(path):  # objects are not moved: there the former one goes first
        remove(aside)
        path.rename(aside)
    remove(path)
    path.mkdir()
    sync_directory(path.parent)


def settle(path: Path) -> None:
    """The checkpoint in `path` is complete: the one that it replaces may go."""
    remove(_aside(path))


def abandon(path: Path) -> None:
    """The save failed: free the space and put the former checkpoint of this step back."""
    remove(path)
    if _aside(path).exists():
        _aside(path).rename(path)


def remove(path: Path) -> None:
    """Remove a checkpoint, marker first: a removal that is cut short leaves no whole checkpoint behind."""
    if path.exists():
        (path / MARKER).unlink(missing_ok=True)
        sync_directory(path)
        remove_tree(path)


def checkpoints(directory: str | Path) -> list[Path]:
    """Whatever is named as a checkpoint is, newest first; of one step, the replaced one comes second."""
    where = place(directory)
    if not where.is_dir():
        return []
    found = [p for p in where.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: (-step_of(p), p.name))


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".replaced")


def _whole(path: Path) -> bool:
    try:
        inspect(path)
    except CheckpointError:
        return False
    return True
