"""Read the blocks that this rank needs, each compared with its checksum.

A flipped bit is an error that names the file, not a model that is slightly wrong. Blocks are read, compared and copied
by several threads at once; each holds one block, so memory stays small however large a piece is.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import local
from typing import IO, Final

import torch
from torch import Tensor

from stretto.checkpoint import index
from stretto.checkpoint.errors import WAY_OUT, CheckpointError
from stretto.checkpoint.index import Piece, blocks, checksum
from stretto.checkpoint.tiling import intersection
from stretto.params import Slice

THREADS: Final = 4


@dataclass(frozen=True)
class Block:
    """Some rows of a piece, where they lie in its file, and what of them goes into which part of a slice."""

    file: str
    at: int
    length: int
    digest: str
    dtype: torch.dtype
    sizes: tuple[int, ...]
    copies: tuple[tuple[Sequence[tuple[int, int]], Tensor], ...]
    """For each: start and length along every dim of the block, and the tensor that it fills."""


def read_pieces(path: Path, reads: Iterable[tuple[index.Tensor, Piece, Slice]]) -> int:
    """Fill the slices; every block is read once. The bytes that were read."""
    wanted = sorted(_blocks(reads), key=lambda block: (block.file, block.at))
    held = local()

    def read(block: Block) -> int:
        streams: dict[str, IO[bytes]] = held.__dict__.setdefault("streams", {})
        if block.file not in streams:
            for stream in streams.values():
                stream.close()
            streams.clear()
            streams[block.file] = (path / block.file).open("rb")
            opened.append(streams[block.file])
        _fill(block, streams[block.file], path)
        return block.length

    opened: list[IO[bytes]] = []
    try:
        with torch.no_grad():
            if len(wanted) < 2:
                return sum(map(read, wanted))
            with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1, len(wanted))) as pool:
                return sum(pool.map(read, wanted))
    finally:
        for stream in opened:
            stream.close()


def _fill(block: Block, stream: IO[bytes], path: Path) -> None:
    stream.seek(block.at)
    content = stream.read(block.length)
    if checksum(content) != block.digest:
        raise CheckpointError(
            f"{path / block.file}: the {block.length} bytes from {block.at} on are not what was written (the checksum "
            f"differs): {WAY_OUT}"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        rows = torch.frombuffer(content, dtype=block.dtype).view(block.sizes)
    for window, into in block.copies:
        part = rows
        for dim, (start, length) in enumerate(window):
            part = part.narrow(dim, start, length)
        with torch.no_grad():
            into.copy_(part)


def _blocks(reads: Iterable[tuple[index.Tensor, Piece, Slice]]) -> Iterator[Block]:
    by_piece: dict[tuple[str, int], tuple[index.Tensor, Piece, list[Slice]]] = {}
    for tensor, piece, s in reads:
        by_piece.setdefault((piece.file, piece.at), (tensor, piece, []))[2].append(s)
    for tensor, piece, slices in by_piece.values():
        dtype = getattr(torch, tensor.dtype)
        for (rows, begin, length), digest in zip(blocks(piece.sizes, tensor.itemsize), piece.sums, strict=True):
            offsets, sizes = piece.offsets, piece.sizes
            if sizes:
                offsets, sizes = (offsets[0] + rows.start, *offsets[1:]), (len(rows), *sizes[1:])
            copies = tuple(copy for s in slices if (copy := _copy(offsets, sizes, s)))
            if copies:
                yield Block(piece.file, piece.at + begin, length, digest, dtype, sizes, copies)


def _copy(offsets: Sequence[int], sizes: Sequence[int], s: Slice) -> tuple[Sequence[tuple[int, int]], Tensor] | None:
    common = intersection((offsets, sizes), (s.offsets, tuple(s.tensor.shape)))
    if common is None:
        return None
    into = s.tensor.detach()
    for dim, (at, start, length) in enumerate(zip(common[0], s.offsets, common[1], strict=True)):
        into = into.narrow(dim, at - start, length)
    return [(at - start, length) for at, start, length in zip(common[0], offsets, common[1], strict=True)], into
