"""Where checkpoints lie: a directory, or a URL of fsspec (`s3://bucket/run`), both with the interface of `pathlib`.

An object of a store appears whole or not at all and has no directory to sync, so what keeps a crash from spoiling a
local file (a temporary name, fsync of file and directory) is not needed there. Other file systems of fsspec, `file://`
and `sftp://` among them, show a file that grows: there a temporary name is. These functions are all that differs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Final, cast

from stretto.checkpoint.errors import CheckpointError

Buffer = bytes | memoryview

STORES: Final = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "r2", "hf", "memory"}
"""Protocols under which an object appears whole."""


def place(said: str | Path) -> Path:
    """The directory that a path or URL names. Raises CheckpointError where its package is not installed."""
    if not isinstance(said, str) or "://" not in said:
        return said if not isinstance(said, str) else Path(said).expanduser()
    try:
        # Other processes write there, too: a listing that was kept would not show what they have written.
        found = import_module("upath").UPath(said, use_listings_cache=False)
        found.fs  # noqa: B018  the package of this protocol is imported now
        return cast("Path", found)
    except ImportError as error:
        raise CheckpointError(f"{said}: {error}; install it with: pip install 'stretto[remote]'") from error
    except ValueError as error:
        raise CheckpointError(f"{said}: {error}") from error


def is_local(path: Path) -> bool:
    """Whether it is a path of this machine's file systems."""
    return isinstance(path, Path)


def write_atomically(file: Path, content: bytes) -> None:
    """Put all of `content` under the name `file`, or nothing, at whatever moment the machine stops."""
    remote: Any = file
    if not is_local(file) and remote.protocol in STORES:
        file.write_bytes(content)
        return
    temporary = file.with_name(file.name + ".tmp")
    write_durably(temporary, [content])
    if not is_local(file):
        remote.fs.mv(cast("Any", temporary).path, remote.path)
        return
    temporary.replace(file)
    sync_directory(file.parent)


def write_durably(file: Path, content: Iterable[Buffer]) -> None:
    """Write `content` and have it on disk. A crash may leave a part of it under the name, where it lies on a disk."""
    with file.open("wb", 0) if is_local(file) else file.open("wb") as stream:
        for each in content:
            view = memoryview(each)
            while len(view):  # a raw file writes 2 GiB at a time at most
                view = view[stream.write(view) :]
        if is_local(file):
            os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """Put the names in a directory on disk: fsync of a file does not cover its name."""
    if not is_local(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Remove a directory and the files in it; nobody else's failure to leave it empty is an error."""
    for file in list(path.iterdir()):
        if file.is_dir() and not file.is_symlink():
            remove_tree(file)
        else:
            file.unlink(missing_ok=True)
    with suppress(OSError, NotImplementedError):  # an object store has no directories
        path.rmdir()
