"""`COMPLETE`: the last file written, which says what a whole checkpoint consists of.

It names every other file with its size, and the digests of what all else hangs on. So one
look at the directory, without reading the tensors, tells a whole checkpoint from a half-written, truncated or
half-copied one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stretto.checkpoint.errors import WAY_OUT, CheckpointError
from stretto.checkpoint.places import is_local, sync_directory, write_atomically
from stretto.reading import LARGEST, UnreadableError, read_json, shown

FORMAT = 2
MARKER = "COMPLETE"
INDEX = "index.jsonl"
METADATA = ".metadata"
EXTRA = "extra.json"
WRITING = "WRITING"
"""Names the save that is under way in a directory."""

DCP = "torch.distributed.checkpoint.metadata"


@dataclass(frozen=True)
class Marker:
    """What the writer saw when everything was on disk."""

    format: int
    step: int
    world_size: int
    """Number of ranks that wrote; a reader may have any other number."""
    sizes: dict[str, int]
    """File name -> bytes, of every file but the marker."""
    table: int
    """Where the table of contents begins in `index.jsonl`."""
    sha256: dict[str, str]
    """Digests of that table, under `index.jsonl`, and of `extra.json`."""


def complete(path: Path, step: int, world_size: int, files: Collection[str], table: int) -> None:
    """Write the marker of the checkpoint in `path`, safe on disk. `files` hold the tensors.

    Raises:
        CheckpointError: a file that some rank has written is not there for this one.
    """
    found = {file.name: file.stat().st_size for file in path.iterdir()}
    if unseen := sorted({*files} - found.keys()):
        raise CheckpointError(
            f"{len(unseen)} of {len(files)} files in {path}, such as {unseen[0]}, were written by other ranks and "
            "cannot be seen here: the directory must lie on a file system that all ranks share"
        )
    sizes = {name: found[name] for name in sorted({*files, INDEX, METADATA, EXTRA})}
    sha256 = {INDEX: _digest(path / INDEX, table), EXTRA: _digest(path / EXTRA)}
    marker = Marker(FORMAT, step, world_size, sizes, table, sha256)
    # No trailing newline: then every proper prefix of the file is invalid JSON, and truncation shows.
    write_atomically(path / MARKER, json.dumps(asdict(marker), indent=1).encode())
    sync_directory(path.parent)


def inspect(path: Path) -> Marker:
    """The marker of a whole checkpoint; reads no tensor.

    Raises:
        CheckpointError: not there, half-written, or a file is missing or not as it was written.
    """
    if is_local(path) and not path.is_dir():  # an object store has files alone
        there = "is not a directory" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {there}: name a checkpoint such as <directory>/step-00000150")
    if not (path / MARKER).exists():
        if (path / "config.json").exists():
            raise CheckpointError(
                f"{path} is the directory of a Hugging Face model, not a checkpoint: stretto train --init-from {path} "
                "goes on with it"
            )
        raise CheckpointError(f"{path} has no {MARKER}: its save did not finish; load an earlier checkpoint")
    marker = read_marker(path)
    for name, size in marker.sizes.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing ({size} bytes): {WAY_OUT}")
        if (found := file.stat().st_size) != size:
            raise CheckpointError(f"{file} has {found} bytes, {size} were written: {WAY_OUT}")
    for name, digest in marker.sha256.items():
        if _digest(path / name, marker.table if name == INDEX else 0) != digest:
            raise CheckpointError(f"{path / name} is not what was written (SHA-256 differs): {WAY_OUT}")
    return marker


def read_extra(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    try:
        extra = read_json(path / EXTRA)
    except UnreadableError as error:
        raise CheckpointError(f"{path / EXTRA} cannot be read ({error}): {WAY_OUT}") from error
    if not isinstance(extra, dict):
        raise CheckpointError(f"{path / EXTRA} holds a {type(extra).__name__}, not an object: {WAY_OUT}")
    return extra


def read_marker(path: Path) -> Marker:
    """The marker of a checkpoint; whether the files are as it says is not looked at."""
    file = path / MARKER
    try:
        found = read_json(file)
        version = found["format"]
        if version == FORMAT:
            return _checked(found)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file} is damaged ({type(error).__name__}: {shown(str(error))}): {WAY_OUT}") from error
    if type(version) is not int:
        raise CheckpointError(f"{file} is damaged (its format is {shown(version)}): {WAY_OUT}")
    raise CheckpointError(f"{file} has format {version}, this Stretto reads {FORMAT}: use the Stretto that wrote it")


def _checked(found: dict[str, Any]) -> Marker:
    """The marker. Raises UnreadableError where it names something else than files beside it with their sizes."""
    sizes, digests = found.get("sizes"), found.get("sha256")
    if not isinstance(sizes, dict) or not isinstance(digests, dict) or set(digests) != {INDEX, EXTRA}:
        raise UnreadableError("its sizes or digests are no tables")
    for name, size in sizes.items():
        if type(size) is not int or Path(name).name != name or name in ("", ".."):
            raise UnreadableError(f"{shown(name)} of {shown(size)} bytes is no file of a checkpoint")
    table = found.get("table")
    if type(table) is not int or not 0 <= table < sizes.get(INDEX, 0):
        raise UnreadableError(f"its table of contents is at {shown(table)}")
    if not 0 < sizes.get(EXTRA, 0) <= LARGEST:  # before it is read for its digest
        raise UnreadableError(f"{EXTRA} of {sizes.get(EXTRA, 0):,} bytes, must have 1 to {LARGEST:,}")
    return Marker(**found)


def _digest(file: Path, begin: int = 0) -> str:
    with file.open("rb") as stream:
        stream.seek(begin)
        return hashlib.file_digest(stream, "sha256").hexdigest()
