"""`COMPLETE`: the last file written, which says what a whole checkpoint consists of.

It names every other file with its size, and the digest of the two small ones on which all else hangs. So one
look at the directory, without reading the tensors, tells a whole checkpoint from a half-written, truncated or
half-copied one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stretto.checkpoint.peers import CheckpointError
from stretto.reading import LARGEST, UnreadableError, read_json, shown

FORMAT = 1
MARKER = "COMPLETE"
METADATA = ".metadata"
EXTRA = "extra.json"
LARGEST_METADATA = 2**29
"""Bytes of `.metadata`: some 3 million pieces."""

WAY_OUT = "restore the file from a copy, or load an earlier checkpoint"


@dataclass(frozen=True)
class Marker:
    """What the writer saw when everything was on disk."""

    format: int
    step: int
    world_size: int
    """Number of ranks that wrote; a reader may have any other number."""
    sizes: dict[str, int]
    """File name -> bytes, of every file but the marker."""
    sha256: dict[str, str]
    """Digests of `.metadata` and `extra.json`."""


def complete(path: Path, step: int, world_size: int, files: Collection[str]) -> None:
    """Write the marker of the checkpoint in `path`, safe on disk. `files` hold the tensors.

    Raises:
        CheckpointError: a file that some rank has written is not there for this one.
    """
    if unseen := [name for name in sorted(files) if not (path / name).exists()]:
        raise CheckpointError(
            f"{len(unseen)} of {len(files)} files in {path}, such as {unseen[0]}, were written by other ranks and "
            "cannot be seen here: the directory must lie on a file system that all ranks share"
        )
    sizes = {file.name: file.stat().st_size for file in sorted(path.iterdir())}
    sha256 = {name: _digest(path / name) for name in (METADATA, EXTRA)}
    marker = Marker(FORMAT, step, world_size, sizes, sha256)
    # No trailing newline: then every proper prefix of the file is invalid JSON, and truncation shows.
    write_atomically(path / MARKER, json.dumps(asdict(marker), indent=1).encode())
    sync_directory(path.parent)


def inspect(path: Path) -> Marker:
    """The marker of a whole checkpoint; reads no tensor.

    Raises:
        CheckpointError: not there, half-written, or a file is missing or not as it was written.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory: name a checkpoint such as <directory>/step-00000150")
    if not (path / MARKER).exists():
        raise CheckpointError(f"{path} has no {MARKER}: its save did not finish; load an earlier checkpoint")
    marker = _read_marker(path / MARKER)
    for name, size in marker.sizes.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing ({size} bytes): {WAY_OUT}")
        if (found := file.stat().st_size) != size:
            raise CheckpointError(f"{file} has {found} bytes, {size} were written: {WAY_OUT}")
    for name, digest in marker.sha256.items():
        if _digest(path / name) != digest:
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


def write_atomically(file: Path, content: bytes) -> None:
    """Put all of `content` under the name `file`, or nothing, at whatever moment the machine stops."""
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
    sync_directory(file.parent)


def sync_directory(path: Path) -> None:
    """Put the names in a directory on disk: fsync of a file does not cover its name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_marker(file: Path) -> Marker:
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
    if not isinstance(sizes, dict) or not isinstance(digests, dict) or set(digests) != {METADATA, EXTRA}:
        raise UnreadableError("its sizes or digests are no tables")
    for name, size in sizes.items():
        if type(size) is not int or Path(name).name != name or name in ("", ".."):
            raise UnreadableError(f"{shown(name)} of {shown(size)} bytes is no file of a checkpoint")
    for name, most in ((METADATA, LARGEST_METADATA), (EXTRA, LARGEST)):
        if not 0 < sizes.get(name, 0) <= most:  # before it is read for its digest
            raise UnreadableError(f"{name} of {sizes.get(name, 0):,} bytes, must have 1 to {most:,}")
    return Marker(**found)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
