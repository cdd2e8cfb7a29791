"""Read the pieces that this rank needs, each compared with its checksum.

A flipped bit is an error that names the file, not a model that is slightly wrong.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

from torch import Tensor
from torch.distributed.checkpoint.planner import ReadItem

from stretto.checkpoint.archive import unpack
from stretto.checkpoint.contents import Contents, Place
from stretto.checkpoint.marker import WAY_OUT
from stretto.checkpoint.peers import CheckpointError
from stretto.checkpoint.writer import CHECKSUMS
from stretto.reading import UnreadableError, read_json


def read_pieces(path: Path, contents: Contents, reads: Iterable[tuple[ReadItem, Tensor]]) -> None:
    """Fill each tensor with the part of a piece that its item names; every piece is read once, in file order."""
    files: dict[str, dict[Place, list[tuple[ReadItem, Tensor]]]] = {}
    for item, into in reads:
        index = item.storage_index
        assert index.offset is not None
        place = contents.places[index.fqn, tuple(index.offset)]
        files.setdefault(place.file, {}).setdefault(place, []).append((item, into))
    for name, pieces in files.items():
        sums = _checksums(path / name)
        with (path / name).open("rb") as stream:
            for place, parts in sorted(pieces.items(), key=lambda each: each[0].offset):
                piece = _piece(stream, path / name, place, contents, parts[0][0], sums)
                for item, into in parts:
                    into.copy_(_part(piece, item))


def _checksums(file: Path) -> Mapping[int, int]:
    sums = file.with_name(file.name + CHECKSUMS)
    try:
        return {int(offset): int(value) for offset, value in read_json(sums).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{sums} cannot be read ({error}): {WAY_OUT}") from error


def _piece(
    stream: IO[bytes], file: Path, place: Place, contents: Contents, item: ReadItem, sums: Mapping[int, int]
) -> Tensor:
    stream.seek(place.offset)
    content = stream.read(place.length)
    where = f"the {place.length} bytes from {place.offset} on"
    if zlib.crc32(content) != sums.get(place.offset):
        raise CheckpointError(f"{file}: {where} are not what was written (CRC-32 differs): {WAY_OUT}")
    tensor = contents.tensors[item.storage_index.fqn]
    sizes = next(chunk.sizes for chunk in tensor.chunks if chunk.offsets == item.storage_index.offset)
    try:
        return unpack(content, tensor.properties.dtype, sizes)
    except UnreadableError as error:
        raise CheckpointError(f"{file}: {where} cannot be read ({error}): {WAY_OUT}") from error


def _part(piece: Tensor, item: ReadItem) -> Tensor:
    for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        piece = piece.narrow(dim, start, length)
    return piece
