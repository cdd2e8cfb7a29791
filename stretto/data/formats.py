"""What is in a file: one text, or a JSON object on each line, plain or compressed.

A file is streamed: compressed lines are unpacked a few at a time. One text must fit in memory, so there is a bound
on it, which also ends a small archive that unpacks to a mountain.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import IO, Any, BinaryIO, Final, cast

from stretto.data.columns import SUFFIXES, rows
from stretto.data.errors import DataError
from stretto.data.files import open_regular
from stretto.data.zstd import open_zstd

LARGEST_TEXT: Final = 1 << 30
"""Bytes of one document."""

RECORD: Final = "*"
"""The key under which the whole record of a line stands, as JSON."""

_BLOCK: Final = 1 << 20

_LINES: Final = frozenset({".jsonl", ".ndjson"})


_UNPACK: Final[Mapping[str, Callable[[BinaryIO], IO[bytes]]]] = MappingProxyType(
    {
        ".gz": lambda file: cast(IO[bytes], gzip.GzipFile(fileobj=file)),
        ".bz2": bz2.BZ2File,
        ".xz": lzma.LZMAFile,
        ".zst": open_zstd,
    }
)

_MAGIC: Final = (
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ",
    b"\x28\xb5\x2f\xfd",
    b"PK\x03\x04",
    b"7z\xbc\xaf",
    b"\x04\x22\x4d\x18",
    b"Rar!",
)
"""How archives begin, by whatever name."""


@dataclass(frozen=True)
class Document:
    """One text and its name: the file's path below the root, `:line` appended for a line."""

    name: str
    text: str


@dataclass(frozen=True)
class Piece:
    """A file, or lines of it: those that begin at the bytes `start`..`stop`, of which the first has number `first`.

    Of a parquet file, the row groups `start`..`stop`, of which the first begins with the row `first`.
    """

    file: str
    start: int = 0
    stop: int | None = None
    first: int = 1


PassOver = Callable[[str, str], None]
"""Told why a file has no document, and its name."""


def _unheard(reason: str, name: str) -> None:
    """Tell nobody."""


def suffixes(name: str) -> tuple[str, str]:
    """What a file is by its name, and how it is compressed: `.jsonl`, `.gz`; in lower case."""
    path = PurePath(name.lower())
    packed = path.suffix if path.suffix in _UNPACK else ""
    return (path.with_suffix("") if packed else path).suffix, packed


def read(root: Path, piece: Piece, key: str, pass_over: PassOver = _unheard) -> Iterator[Document]:
    """The documents of a piece. `pass_over(reason, name)` is told when the file has none.

    In lines, the text is what stands under `key`. Raises DataError when the file cannot be read, or a line has no
    text.
    """
    path, (suffix, packed) = root / piece.file, suffixes(piece.file)
    try:
        with ExitStack() as stack:
            file: IO[bytes] = stack.enter_context(open_regular(path))
            if suffix in SUFFIXES and not packed:
                yield from _table(cast(BinaryIO, file), path, piece, key)
                return
            if packed:
                file = stack.enter_context(_UNPACK[packed](file))  # type: ignore[arg-type]
            elif piece.start:
                file.seek(piece.start)
            begin = b""
            if suffix == ".json" and not piece.start:
                begin = _line(file, path, 1)
            if suffix in _LINES or piece.start or (begin and is_record(begin, key)):
                yield from _lines(file, begin, path, piece, key)
            elif text := _text(_whole(file, begin), path, lambda reason: pass_over(reason, piece.file)):
                yield Document(piece.file, text)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"cannot unpack {path}: {error}; it is damaged or cut short") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _table(file: BinaryIO, path: Path, piece: Piece, key: str) -> Iterator[Document]:
    """One document for each row; empty ones and those without a text are passed over."""
    if key == RECORD:
        raise DataError(f"{path} is a table; --format chat reads JSON lines, as `to_json(..., lines=True)` writes them")
    for number, text in enumerate(rows(path, file, key, (piece.start, piece.stop)), start=piece.first):
        if text is not None and (checked := text_of({key: text}, f"{path}, row {number}", key)):
            yield Document(f"{piece.file}:{number}", checked)


def is_record(line: bytes, key: str) -> bool:
    """Whether a line is a JSON object with a text under `key`: then so are the other lines of its file."""
    if not line.lstrip().startswith(b"{"):
        return False
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and (key == RECORD or isinstance(record.get(key), str))


def _text(raw: bytes, path: Path, pass_over: Callable[[str], None]) -> str:
    """The text of a file, line ends as they are; empty when it has none."""
    if len(raw) > LARGEST_TEXT:
        raise DataError(
            f"{path} has more than {LARGEST_TEXT:,} bytes, too much for one document; cut it into several files, or "
            "give one JSON object with a text on each line of a .jsonl"
        )
    if not raw:
        pass_over("empty")
        return ""
    if raw.startswith(_MAGIC):
        pass_over("compressed in a way that is not read")
        return ""
    try:
        if b"\0" not in raw:
            return raw.decode("utf-8")
        pass_over("not UTF-8" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "binary")
    except UnicodeDecodeError:
        pass_over("not UTF-8")
    return ""


def _whole(file: IO[bytes], begin: bytes) -> bytes:
    """The rest of a file after its beginning; of one that is too large, as much as shows it."""
    pieces, size = [begin], len(begin)
    while size <= LARGEST_TEXT and (block := file.read(_BLOCK)):  # a read of a GiB would ask for a GiB of memory first
        pieces.append(block)
        size += len(block)
    return b"".join(pieces)


def _line(file: IO[bytes], path: Path, number: int) -> bytes:
    line = file.readline(LARGEST_TEXT + 1)
    if len(line) > LARGEST_TEXT:
        raise DataError(f"{path}, line {number}: more than {LARGEST_TEXT:,} bytes")
    return line


def _lines(file: IO[bytes], begin: bytes, path: Path, piece: Piece, key: str) -> Iterator[Document]:
    """One document for each line; blank lines and empty texts are passed over."""
    at, number = piece.start, piece.first
    while piece.stop is None or at < piece.stop:
        line = begin or _line(file, path, number)
        if not line:
            return
        begin = b""
        if line.strip() and (text := _text_field(line, f"{path}, line {number}", key)):
            yield Document(f"{piece.file}:{number}", text)
        at, number = at + len(line), number + 1


def _text_field(line: bytes, where: str, key: str) -> str:
    try:
        record: Any = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error.reason} at byte {error.start} of the line)") from None
    except (ValueError, RecursionError) as error:  # bad JSON, or brackets in brackets
        raise DataError(f"{where}: not JSON ({error}); each line must be an object with a {key} field") from None
    if not isinstance(record, dict):
        raise DataError(f'{where}: {_kind(record)}, but each line must be {{"{key}": "..."}}')
    return text_of(record, where, key)


def _kind(value: object) -> str:
    """What JSON calls it."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def text_of(record: Mapping[str, Any], where: str, key: str) -> str:
    """What stands under `key`. Raises DataError when it is no text."""
    text = json.dumps(record, ensure_ascii=False) if key == RECORD else record.get(key)
    if not isinstance(text, str):
        found = f"{key} is {_kind(text)}" if key in record else f"has only {sorted(record)[:20]}"
        raise DataError(f"{where}: no {key} field with a string ({found}); --text-key names another field")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {key} is not valid Unicode (half a surrogate pair at {error.start})") from None
    return text
