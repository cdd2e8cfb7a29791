"""Read the blocks that this rank needs, each compared with its checksum.

A flipped bit is an error that names the file, not a model that is slightly wrong. Blocks are read, compared and copied
by several threads at once, so that the disk has always something to do. A block of whole rows of one tensor is read
where it belongs; any other through the thread's own buffer, so memory stays small however large a piece is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import local
from typing import IO, Any, Final

import torch
from torch import Tensor

from stretto.checkpoint import index
from stretto.checkpoint.directory import way_out
from stretto.checkpoint.errors import CheckpointError
from stretto.checkpoint.index import Piece, blocks, checksum
from stretto.checkpoint.places import is_local
from stretto.checkpoint.tiling import intersection
from stretto.params import Slice

THREADS: Final = 4
"""More than there are cores, where these are few: most of the time all but one wait for the disk."""


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

    @property
    def target(self) -> Tensor | None:
        """The memory that the block fills as it lies in the file, where there is such."""
        if len(self.copies) != 1:
            return None
        into = self.copies[0][1]
        same = tuple(into.shape) == self.sizes and into.dtype == self.dtype
        return into if same and into.is_contiguous() and into.device.type == "cpu" else None


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
            # Whatever is asked for is read: a buffer of Python's own would be one copy more.
            streams[block.file] = (
                (path / block.file).open("rb", 0) if is_local(path) else (path / block.file).open("rb")
            )
            opened.append(streams[block.file])
        buffer: Tensor | None = getattr(held, "buffer", None)
        if buffer is None or len(buffer) < block.length:
            buffer = held.buffer = torch.empty(block.length, dtype=torch.uint8)
        _fill(block, streams[block.file], path, buffer)
        return block.length

    opened: list[IO[bytes]] = []
    try:
        with torch.no_grad():
            if len(wanted) < 2:
                return sum(map(read, wanted))
            with ThreadPoolExecutor(min(THREADS, len(wanted))) as pool:
                return sum(pool.map(read, wanted))
    finally:
        for stream in opened:
            stream.close()


def _fill(block: Block, stream: IO[bytes], path: Path, buffer: Tensor) -> None:
    straight = block.target
    rows = buffer[: block.length].view(block.dtype).view(block.sizes) if straight is None else straight
    array: Any = rows.view(-1).view(torch.uint8).numpy()
    content = memoryview(array)
    stream.seek(block.at)
    left = content
    while left and (n := stream.readinto(left)):  # type: ignore[attr-defined]  # of the files of fsspec, too
        left = left[n:]
    if left or checksum(content) != block.digest:
        raise CheckpointError(
            f"{path / block.file}: the {block.length} bytes from {block.at} on are not what was written (the checksum "
            f"differs): {way_out(path)}"
        )
    if straight is not None:
        return
    for window, into in block.copies:
        part = rows
        for dim, (start, length) in enumerate(window):
            part = part.narrow(dim, start, length)
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
