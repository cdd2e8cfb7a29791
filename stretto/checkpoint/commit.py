"""From the parts of all ranks to a whole checkpoint; one process does it, for all."""

from __future__ import annotations

from pathlib import Path

from stretto.checkpoint.dcp import dcp_metadata
from stretto.checkpoint.directory import settle
from stretto.checkpoint.errors import CheckpointError
from stretto.checkpoint.index import encoded
from stretto.checkpoint.marker import EXTRA, INDEX, METADATA, WRITING, complete
from stretto.checkpoint.part import data_name, part_name, read_part, whole_tensors
from stretto.checkpoint.places import write_atomically
from stretto.reading import UnreadableError


def missing_parts(path: Path, size: int, token: str) -> list[int]:
    """The ranks whose parts are not there yet."""
    there = {file.name for file in path.iterdir()}
    return [rank for rank in range(size) if part_name(rank, token) not in there]


def commit(path: Path, step: int, size: int, token: str, extra: bytes) -> None:
    """Make a checkpoint of the parts that `size` ranks have written to `path`: the index, and the marker last.

    Raises CheckpointError, with no marker written, when a part is not there or the pieces do not tile the tensors.
    """
    if missing := missing_parts(path, size, token):
        raise CheckpointError(
            f"{len(missing)} of {size} files in {path}, such as {part_name(missing[0], token)}, were written by other "
            "ranks and cannot be seen here: the directory must lie on a file system that all ranks share"
        )
    try:
        parts = (read_part(path, rank, token) for rank in range(size))
        tensors = whole_tensors(parts, [data_name(rank, token) for rank in range(size)])
    except UnreadableError as error:
        raise CheckpointError(f"what a rank has written to {path} cannot be read: {error}") from error
    index, table = encoded(tensors)
    write_atomically(path / INDEX, index)
    write_atomically(path / METADATA, dcp_metadata(tensors))
    write_atomically(path / EXTRA, extra)
    if (path / WRITING).exists() and (path / WRITING).read_text() != token:
        raise CheckpointError(f"another run writes to {path} now")
    complete(path, step, size, {p.file for t in tensors for p in t.pieces}, table)
    settle(path)
    for name in (WRITING, *(part_name(rank, token) for rank in range(size))):
        (path / name).unlink(missing_ok=True)
