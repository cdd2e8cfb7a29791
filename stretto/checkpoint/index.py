"""`index.jsonl`: which piece of which tensor lies where. A line for each tensor, then one with the table of contents.

A rank reads the table and, of the lines of tensors that it holds a part of, the *runs* of `RUN` pieces that lie near
its own: of a tensor that a thousand ranks have written it reads a hundred pieces. A run's checksum and the
rectangle around it stand in the table. Every number is held against the files: a piece lies inside its file and its
tensor, is large enough for its elements, and the pieces tile each tensor, or what is read of it. So no size that is
named is larger than what is on disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import xxhash

from stretto.checkpoint.archive import archive
from stretto.checkpoint.directory import way_out
from stretto.checkpoint.errors import CheckpointError
from stretto.checkpoint.marker import INDEX, Marker, inspect
from stretto.checkpoint.places import Buffer
from stretto.checkpoint.tiling import Rectangle, disjoint_errors, intersection, tiling_errors
from stretto.reading import UnreadableError, parse_json, shown

BLOCK: Final = 2**23
"""Bytes of a piece that have a checksum of their own, rounded to whole rows: what is read at a time."""

ITEMSIZE: Final = MappingProxyType(
    {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "bool": 1}
    | {f"{sign}int{bits}": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)}
    | {f"float8_{kind}": 1 for kind in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0fnu")}
    | {"complex64": 8, "complex128": 16}
)
"""Bytes of an element, by the name of a dtype of torch."""

RUN: Final = 64
"""Pieces of a tensor that are read at a time, where it has more."""

LARGEST_TABLE: Final = 2**28
LARGEST_LINE: Final = 2**28


def checksum(content: Buffer) -> str:
    """Of bytes on disk: finds damage, not forgery."""
    return xxhash.xxh3_64_hexdigest(content)


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a tensor: its numbers are contiguous from byte `at` of a file on; a checksum for each block."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    at: int
    sums: tuple[str, ...]
    start: int = 0
    """Where the archive of the piece begins in its file, and how long it is: for plain PyTorch."""
    length: int = 0


@dataclass(frozen=True)
class Tensor:
    """A logical tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...] = ()

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.itemsize

    def __str__(self) -> str:
        """Shape and type: "(8, 16) bfloat16"."""
        return f"{tuple(self.shape)} {self.dtype}"


def blocks(sizes: Sequence[int], itemsize: int) -> Iterator[tuple[range, int, int]]:
    """The blocks of a piece: its rows, the first byte of the numbers, and the number of bytes."""
    rows = sizes[0] if sizes else 1
    width = math.prod(sizes[1:]) * itemsize
    step = max(1, BLOCK // max(width, 1))
    for begin in range(0, rows if width else 0, step):
        end = min(begin + step, rows)
        yield range(begin, end), begin * width, (end - begin) * width


def encoded(tensors: Iterable[Tensor]) -> tuple[bytes, int]:
    """`index.jsonl`, and where the table of contents begins in it."""
    files: dict[str, int] = {}
    lines, table, runs, at = [], {}, {}, 0
    for tensor in tensors:
        texts = [
            json.dumps([[p.offsets, p.sizes, files.setdefault(p.file, len(files)), p.at, p.sums] for p in run],
                       separators=(",", ":"))[1:-1].encode()
            for run in _runs(tensor.pieces)
        ]  # fmt: skip
        line = b"[" + b",".join(texts) + b"]\n"
        table[tensor.name] = [tensor.dtype, tensor.shape, at, len(line), checksum(line)]
        if len(texts) > 1:
            around = map(bounds, _runs(tensor.pieces))
            runs[tensor.name] = [[len(t), checksum(t), *box] for t, box in zip(texts, around, strict=True)]
        lines.append(line)
        at += len(line)
    contents = {"files": list(files), "tensors": table, "runs": runs}
    lines.append(json.dumps(contents, separators=(",", ":")).encode())
    return b"".join(lines), at


def _runs(pieces: Sequence[Piece]) -> Iterator[Sequence[Piece]]:
    return (pieces[at : at + RUN] for at in range(0, len(pieces), RUN))


def bounds(pieces: Iterable[Piece]) -> tuple[list[int], list[int]]:
    """Offsets and sizes of the rectangle around some pieces."""
    begins, ends = zip(
        *((p.offsets, [o + n for o, n in zip(p.offsets, p.sizes, strict=True)]) for p in pieces), strict=True
    )
    low = [min(each) for each in zip(*begins, strict=True)]
    return low, [max(each) - begin for each, begin in zip(zip(*ends, strict=True), low, strict=True)]


class Index:
    """The tensors of a checkpoint; their pieces are read when they are asked for."""

    def __init__(self, path: Path, marker: Marker | None = None) -> None:
        """Read the table of contents. Raises CheckpointError where the checkpoint is not whole or not readable."""
        self.path, self.marker = path, marker or inspect(path)
        self._file = path / INDEX

        def read() -> None:
            size = self.marker.sizes[INDEX]
            table = parse_json(self._bytes(self.marker.table, size - self.marker.table, LARGEST_TABLE))
            self._files: list[str] = [_known(name, self.marker.sizes) for name in table["files"]]
            self._lines: dict[str, list[Any]] = table["tensors"]
            self._runs: dict[str, list[list[Any]]] = table.get("runs", {})
            self.tensors = {name: _tensor(name, said) for name, said in self._lines.items()}

        self._reading(read)

    tensors: Mapping[str, Tensor]
    """By name, without pieces."""

    def tensor(self, name: str) -> Tensor:
        """A tensor with its pieces."""
        found: Tensor = self._reading(lambda: self._tensor(name))
        return found

    def near(self, name: str, rectangles: Sequence[Rectangle]) -> Tensor:
        """A tensor with the pieces, of those that it has, that may hold something of these rectangles."""
        found: Tensor = self._reading(lambda: self._near(name, rectangles))
        return found

    def __iter__(self) -> Iterator[Tensor]:
        """All tensors with their pieces, one at a time."""
        return (self.tensor(name) for name in self.tensors)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    def _tensor(self, name: str) -> Tensor:
        known, (at, length, digest) = self.tensors[name], self._lines[name][2:]
        pieces = self._pieces(known, self._bytes(_whole(at), _whole(length), LARGEST_LINE), digest)
        if errors := tiling_errors(known.shape, [(p.offsets, p.sizes) for p in pieces]):
            raise UnreadableError(f"{shown(name)}: {errors[0]}")
        return Tensor(name, known.dtype, known.shape, pieces)

    def _near(self, name: str, rectangles: Sequence[Rectangle]) -> Tensor:
        if name not in self._runs:
            return self._tensor(name)
        known, (start, length, _) = self.tensors[name], self._lines[name][2:]
        at, end, pieces = _whole(start) + 1, start + _whole(length), list[Piece]()
        for size, digest, offsets, sizes in self._runs[name]:
            if any(intersection((_wholes(offsets), _wholes(sizes)), each) for each in rectangles):
                if at + _whole(size) > end:
                    raise UnreadableError(f"{shown(name)}: its runs are longer than its line")
                pieces += self._pieces(known, self._bytes(at, size, LARGEST_LINE), digest, b"[%b]")
            at += _whole(size) + 1  # and a comma
        if errors := disjoint_errors(known.shape, [(p.offsets, p.sizes) for p in pieces]):
            raise UnreadableError(f"{shown(name)}: {errors[0]}")
        return Tensor(name, known.dtype, known.shape, tuple(pieces))

    def _pieces(self, tensor: Tensor, text: bytes, digest: object, form: bytes = b"%b") -> tuple[Piece, ...]:
        if checksum(text) != digest:
            raise UnreadableError(f"{shown(tensor.name)}: its line is not what was written")
        return tuple(self._piece(tensor, said) for said in parse_json(form % text))

    def _piece(self, tensor: Tensor, said: Any) -> Piece:
        offsets, sizes, number, at, sums = said
        file = self._files[_whole(number)]
        piece = Piece(_wholes(offsets), _wholes(sizes), file, _whole(at), tuple(sums))
        if len(piece.offsets) != len(tensor.shape) or len(piece.sizes) != len(tensor.shape):
            raise UnreadableError(f"{shown(tensor.name)}: a piece of it has another number of dims")
        need = math.prod(piece.sizes) * tensor.itemsize
        if piece.at + need > self.marker.sizes[file]:
            raise UnreadableError(
                f"{shown(tensor.name)}: {need:,} bytes from {piece.at:,} on of {file}, which has "
                f"{self.marker.sizes[file]:,}"
            )
        if len(sums) != sum(1 for _ in blocks(piece.sizes, tensor.itemsize)) or not all(
            isinstance(each, str) for each in sums
        ):
            raise UnreadableError(f"{shown(tensor.name)}: its checksums are not those of its blocks")
        return piece

    def _bytes(self, at: int, length: int, largest: int) -> bytes:
        if length > largest:
            raise UnreadableError(f"{length:,} bytes of it, at most {largest:,} are read")
        with self._file.open("rb") as stream:
            stream.seek(at)
            return stream.read(length)

    def _reading(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OSError, OverflowError) as error:
            why = str(error) if isinstance(error, UnreadableError) else f"{type(error).__name__}: {shown(str(error))}"
            raise CheckpointError(f"{self._file} cannot be read ({why}): {way_out(self.path)}") from error


def _tensor(name: object, said: Any) -> Tensor:
    dtype, shape, at, length, digest = said
    if not isinstance(name, str) or not isinstance(digest, str) or dtype not in ITEMSIZE:
        raise UnreadableError(f"{shown(name)} of {shown(dtype)} is no tensor")
    _wholes((at, length))
    return Tensor(name, dtype, _wholes(shape))


def _known(name: object, sizes: Mapping[str, int]) -> str:
    if not isinstance(name, str) or name not in sizes:
        raise UnreadableError(f"it names the file {shown(name)}, which is not of this checkpoint")
    return name


def _wholes(numbers: Any) -> tuple[int, ...]:
    return tuple(_whole(n) for n in numbers)


def _whole(n: object) -> int:
    if type(n) is not int or not 0 <= n < 2**63:
        raise UnreadableError(f"{shown(n)} is no size")
    return n


def archived(dtype: str, sizes: Sequence[int]) -> tuple[int, int]:
    """Bytes of the archive of a piece, and where its numbers begin in it."""
    nbytes = math.prod(sizes) * ITEMSIZE[dtype]
    around = archive(dtype, sizes, nbytes)
    return len(around.before) + nbytes + len(around.after), len(around.before)
