"""What lies in a directory of checkpoints, told without a process group, and nearly all of it without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stretto.checkpoint.directory import Found, Skipped, checkpoints, latest_complete, step_of
from stretto.checkpoint.errors import CheckpointError
from stretto.checkpoint.index import Index, blocks, checksum
from stretto.checkpoint.marker import inspect, read_extra
from stretto.checkpoint.places import place

AXES = ("tp", "cp", "dp", "pp", "ep", "etp")


@dataclass(frozen=True)
class Entry:
    """One checkpoint, as far as it can be read."""

    path: Path
    step: int
    problem: str | None = None
    """Why it is not whole."""
    nbytes: int = 0
    """Of all files."""
    ranks: int = 0
    """That wrote it."""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the run that wrote it, by section; empty where it does not say."""
        record = self.extra.get("record")
        arguments = record.get("arguments") if isinstance(record, dict) else None
        return arguments if isinstance(arguments, dict) else {}

    @property
    def layout(self) -> str:
        """The layout that wrote it."""
        said = self.settings.get("parallel")
        if not isinstance(said, dict):
            return f"{self.ranks} ranks"
        axes = [f"{axis}={said[axis]}" for axis in AXES if said.get(axis) not in (None, 1)]
        modes = [f"{said[name]}" for name in ("sharding", "schedule") if said.get(name) not in (None, "none")]
        return ", ".join([" x ".join(axes) or "one rank", *modes])


def directory_of(said: str | Path) -> Path:
    """The directory of checkpoints that is meant: itself, or that of a run.

    Raises CheckpointError when there is none.
    """
    where = place(said)
    for directory in (where, where / "checkpoints"):
        if checkpoints(directory):
            return directory
    there = "has no checkpoints" if where.is_dir() else "does not exist"
    raise CheckpointError(f"{where} {there}: name the directory of a run, or its directory of checkpoints")


def meant(said: str | Path) -> Found:
    """The checkpoint that is meant: itself, or the newest whole one of a directory; and those passed over for it.

    Its path is None where all are passed over. Raises CheckpointError where there is no checkpoint at all.
    """
    where = place(said)
    for directory in (where, where / "checkpoints"):
        found = latest_complete(directory)
        if found.path or found.skipped:
            return found
    inspect(where)
    return Found(where)


def checkpoint_of(said: str | Path, pass_over: Callable[[Skipped], object] = lambda _: None) -> Path:
    """The whole checkpoint that is meant; `pass_over` hears of the newer ones. Raises CheckpointError."""
    found = meant(said)
    if found.path is None:
        raise CheckpointError(f"no checkpoint of {said} is whole; the newest: {found.skipped[0]}")
    for each in found.skipped:
        pass_over(each)
    return found.path


def entry(path: Path, step: int | None = None) -> Entry:
    """What there is to say of a checkpoint, whole or not."""
    named = step_of(path) if step is None else step
    try:
        marker = inspect(path)
        return Entry(path, marker.step, None, sum(marker.sizes.values()), marker.world_size, read_extra(path))
    except CheckpointError as error:
        nbytes = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        return Entry(path, named, str(error), nbytes)


def entries(directory: Path) -> list[Entry]:
    """All in a directory, newest first."""
    return [entry(path) for path in checkpoints(directory)]


def damage(path: Path) -> Iterator[str]:
    """Read all of a checkpoint and compare it with its checksums: what is wrong with it, a line each."""
    try:
        index = Index(path)
    except CheckpointError as error:
        yield str(error)
        return
    for name in index.tensors:
        try:
            tensor = index.tensor(name)
        except CheckpointError as error:
            yield str(error)
            continue
        for piece in tensor.pieces:
            with (path / piece.file).open("rb") as stream:
                for (_, begin, length), digest in zip(blocks(piece.sizes, tensor.itemsize), piece.sums, strict=True):
                    stream.seek(piece.at + begin)
                    if checksum(stream.read(length)) != digest:
                        at = f"{length:,} bytes from {piece.at + begin:,} on of {piece.file}"
                        yield f"{name}: {at} are not what was written"


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings by path that differ between two trees of sections, with both values."""
    flat = [
        {
            f"{section}.{name}": value
            for section, body in tree.items()
            if isinstance(body, dict)
            for name, value in body.items()
        }
        for tree in (before, after)
    ]
    paths = dict.fromkeys([*flat[0], *flat[1]])
    return {p: (flat[0].get(p), flat[1].get(p)) for p in paths if flat[0].get(p) != flat[1].get(p)}
