"""What one rank writes of a checkpoint: a file with its pieces, and beside it what the pieces are.

A save has a token, which stands in the names of these files. So what a writer of an earlier run may still be writing
is never taken for a part of this save.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stretto.checkpoint.archive import ALIGNED, archive
from stretto.checkpoint.errors import CheckpointError
from stretto.checkpoint.index import ITEMSIZE, Piece, Tensor, archived, blocks, checksum
from stretto.checkpoint.places import Buffer, write_atomically, write_durably
from stretto.checkpoint.tiling import tiling_errors
from stretto.reading import LARGEST, read_json

LARGEST_PART = 8 * LARGEST


@dataclass(frozen=True)
class Owned:
    """A piece that a rank is to write."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of an element. Raises CheckpointError for a dtype that no checkpoint holds."""
        if self.dtype not in ITEMSIZE:
            raise CheckpointError(f"{self.name}: tensors of {self.dtype} cannot be saved")
        return ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the piece."""
        size = self.itemsize
        for n in self.sizes:
            size *= n
        return size


@dataclass(frozen=True)
class Mine:
    """All that a rank says of a save: its pieces, empty ones too, and the names of what it has copies of only."""

    pieces: tuple[Owned, ...]
    copies: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"pieces": [list(asdict(p).values()) for p in self.pieces], "copies": list(self.copies)}

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> Mine:
        """What `as_dict` gave."""
        pieces = (Owned(n, d, tuple(s), tuple(o), tuple(z)) for n, d, s, o, z in said["pieces"])
        return cls(tuple(pieces), tuple(said["copies"]))


def data_name(rank: int, token: str) -> str:
    """The file with a rank's pieces."""
    return f"__{rank}_{token}.distcp"


def part_name(rank: int, token: str) -> str:
    """The file that says what they are, until the checkpoint is whole."""
    return f"__{rank}_{token}.json"


def write_part(path: Path, rank: int, token: str, mine: Mine, content: Callable[[int], Buffer]) -> int:
    """Write this rank's pieces, safe on disk, and then what they are; the bytes of the first file.

    `content(i)` gives the numbers of piece i, contiguous; each is asked for once, in order.
    """
    file, written = data_name(rank, token), []
    sums: dict[int, list[str]] = {}
    starts, at = {}, 0
    for i, piece in enumerate(mine.pieces):
        if piece.nbytes:
            starts[i] = at
            at += archived(piece.dtype, piece.sizes)[0]
            at += -at % ALIGNED

    def stream() -> Iterator[Buffer]:
        done = 0
        for i, start in starts.items():
            piece, numbers = mine.pieces[i], memoryview(content(i)).cast("B")
            around = archive(piece.dtype, piece.sizes, piece.nbytes)
            yield bytes(start - done) + around.before
            sums[i] = []
            for _, begin, length in blocks(piece.sizes, piece.itemsize):
                block = numbers[begin : begin + length]
                sums[i].append(checksum(block))
                yield block
            yield around.after
            done = start + len(around.before) + piece.nbytes + len(around.after)

    if starts:
        write_durably(path / file, stream())
    for i, piece in enumerate(mine.pieces):
        length, inside = archived(piece.dtype, piece.sizes)
        start = starts.get(i, 0)
        written.append([*asdict(piece).values(), start, length, start + inside, sums.get(i, [])])
    said = {"pieces": written, "copies": list(mine.copies)}
    write_atomically(path / part_name(rank, token), json.dumps(said, separators=(",", ":")).encode())
    return at


def read_part(path: Path, rank: int, token: str) -> dict[str, Any]:
    """What `write_part` said of a rank's pieces. Raises UnreadableError."""
    said: dict[str, Any] = read_json(path / part_name(rank, token), LARGEST_PART)
    return said


def whole_tensors(parts: Iterable[Mapping[str, Any]], names: Sequence[str]) -> list[Tensor]:
    """The tensors that the parts of all ranks make, by name; `names` are the ranks' files.

    Raises CheckpointError unless the pieces tile each tensor once.
    """
    known: dict[str, tuple[str, tuple[int, ...]]] = {}
    pieces: dict[str, list[Piece]] = {}
    errors, copies = set(), set[str]()
    for part, file in zip(parts, names, strict=True):
        copies |= set(part["copies"])
        for name, dtype, shape, offsets, sizes, start, length, at, sums in part["pieces"]:
            first = known.setdefault(name, (dtype, tuple(shape)))
            held = pieces.setdefault(name, [])
            if first != (dtype, tuple(shape)):
                errors.add(f"{name}: {first[1]} {first[0]} on one rank, {tuple(shape)} {dtype} on another")
            elif all(sizes):
                held.append(Piece(tuple(offsets), tuple(sizes), file, at, tuple(sums), start, length))
    # In the order of their offsets, neighbours stand beside each other in the index.
    found = [Tensor(name, *known[name], tuple(sorted(pieces[name], key=_offsets))) for name in sorted(known)]
    errors |= {
        f"{t.name}: {e}" for t in found for e in tiling_errors(t.shape, [(p.offsets, p.sizes) for p in t.pieces])
    }
    errors |= {f"{name}: no rank is owner of any piece" for name in copies - known.keys()}
    if errors:
        raise CheckpointError("the slices do not make whole tensors\n  " + "\n  ".join(sorted(errors)))
    return found


def _offsets(piece: Piece) -> tuple[int, ...]:
    return piece.offsets
