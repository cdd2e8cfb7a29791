"""A token store: one file that a process maps into memory and never reads whole.

    header   4096 bytes: JSON, padded with spaces; `head -c 4096` shows it
    tokens   [n] uint16 or uint32, by the size of the vocabulary; padded to 8 bytes
    offsets  [documents + 1] int64

The tokens are `eod, document, eod, document, eod, ...`: the first `eod` stands before the first document,
so that every token of every text is predicted from something. Document i, its closing `eod` included, is
`tokens[offsets[i]:offsets[i + 1]]`.

A store that is `masked` says of each token whether it counts as a prediction: the highest bit of one that does not is
set. So which tokens count is in the digest, and in every window. Between documents no `eod` counts there.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from stretto.data.errors import DataError

_FORMAT = "stretto tokens 2"
_HEADER = 4096


@dataclass(frozen=True)
class Header:
    """What a store says of itself.

    `fingerprint` names what it was made from; `digest` is a hash of the tokens, the same for two stores
    exactly if a run over them sees the same text. `bytes` counts the text as UTF-8, without the `eod`s.
    """

    fingerprint: str
    digest: str
    dtype: str
    vocab_size: int
    eod: int
    tokens: int
    documents: int
    bytes: int
    masked: bool = False

    @property
    def unused(self) -> int:
        """The bit of a token that does not count; 0 where all do."""
        return 1 << (8 * np.dtype(self.dtype).itemsize - 1) if self.masked else 0

    @property
    def token_bytes(self) -> int:
        """Bytes that the tokens fill in the file, padding included."""
        return -(-self.tokens * np.dtype(self.dtype).itemsize // 8) * 8

    @property
    def file_bytes(self) -> int:
        """The size that the whole file must have."""
        return _HEADER + self.token_bytes + 8 * (self.documents + 1)


@dataclass(frozen=True, eq=False)
class TokenStore:
    """An open store; `tokens` [n] and `offsets` [documents + 1] are read-only views of the file."""

    path: Path
    header: Header
    tokens: NDArray[np.unsignedinteger[Any]]
    offsets: NDArray[np.int64]

    @classmethod
    def open(cls, path: Path) -> TokenStore:
        """Map the store at `path`. Raises DataError when it is missing, cut short or not a store."""
        header = _read_header(path)
        size = path.stat().st_size
        if size != header.file_bytes:
            raise DataError(f"{path} has {size} bytes, its header says {header.file_bytes}; delete it")
        tokens = np.memmap(path, dtype=header.dtype, mode="r", offset=_HEADER, shape=(header.tokens,))
        start = _HEADER + header.token_bytes
        offsets = np.memmap(path, dtype="<i8", mode="r", offset=start, shape=(header.documents + 1,))
        return cls(path, header, tokens, offsets)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text for each predicted token (all but the first `eod`); 0 for a store without text."""
        return self.header.bytes / max(self.header.tokens - 1, 1)

    def document(self, i: int) -> NDArray[np.int64]:
        """The ids [n] of document i, without its closing `eod`."""
        ids = self.tokens[self.offsets[i] : self.offsets[i + 1]].astype(np.int64) & ~self.header.unused
        return ids[:-1] if len(ids) and ids[-1] == self.header.eod else ids

    def window(self, number: int, seq_len: int) -> NDArray[np.unsignedinteger[Any]]:
        """The tokens `number * seq_len`.. of one sample, one more than it has predictions; fewer at the end.

        They are as they are stored: `as_batch` tells which of them count.
        """
        return self.tokens[number * seq_len : (number + 1) * seq_len + 1]

    def uncounted(self, seq_len: int) -> int:
        """Of all whole windows, those in which no prediction counts. Reads the whole file."""
        number, at_once = (self.header.tokens - 1) // seq_len, max((1 << 22) // seq_len, 1)
        found = 0
        for first in range(0, number, at_once):
            last = min(first + at_once, number)
            labels = self.tokens[first * seq_len + 1 : last * seq_len + 1].reshape(last - first, seq_len)
            found += int(np.all(labels & self.header.unused, axis=1).sum())
        return found

    def intact(self) -> bool:
        """Whether the tokens still have the digest that the header says. Reads the whole file."""
        digest = hashlib.blake2b(digest_size=16)
        for start in range(0, self.header.tokens, 1 << 22):
            digest.update(self.tokens[start : start + (1 << 22)].tobytes())
        return digest.hexdigest() == self.header.digest


class StoreWriter:
    """Appends documents to a store under construction; made by `write_store`."""

    def __init__(self, file: BinaryIO, *, vocab_size: int, eod: int, masked: bool = False):
        self._file, self._masked = file, masked
        self._vocab_size, self._eod = vocab_size, eod
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << (15 if masked else 16) else "<u4")
        self._unused = 1 << (8 * self._dtype.itemsize - 1)
        self._digest = hashlib.blake2b(digest_size=16)
        self._offsets = array("q", [1])
        self._bytes = 0
        file.write(b" " * _HEADER)
        self._write(self._between)

    @property
    def _between(self) -> NDArray[np.int64]:
        """What stands between two documents."""
        return np.array([~self._eod if self._masked else self._eod])

    def add(self, ids: NDArray[np.int64], text_bytes: int) -> None:
        """Append one document: its ids [n], ~id where a token does not count, and how many bytes its text has.

        Raises DataError when an id lies outside the vocabulary.
        """
        least = -self._vocab_size if self._masked else 0
        if ids.size and not least <= int(ids.min()) <= int(ids.max()) < self._vocab_size:
            raise DataError(
                f"document {self.documents}: token ids {ids.min()}..{ids.max()} "
                f"lie outside the vocabulary of {self._vocab_size}"
            )
        self._write(ids)
        self._write(self._between)
        self._offsets.append(self._offsets[-1] + len(ids) + 1)
        self._bytes += text_bytes

    def extend(self, other: TokenStore) -> None:
        """Append all documents of a store of the same vocabulary."""
        for start in range(1, other.header.tokens, 1 << 22):
            self._write(other.tokens[start : start + (1 << 22)])
        moved = other.offsets[1:] + (self._offsets[-1] - 1)
        self._offsets.frombytes(moved.astype(np.int64).tobytes())
        self._bytes += other.header.bytes

    @property
    def documents(self) -> int:
        """Documents so far."""
        return len(self._offsets) - 1

    def finish(self, fingerprint: str) -> None:
        """Write what follows the tokens, and last the header."""
        header = Header(
            fingerprint=fingerprint,
            digest=self._digest.hexdigest(),
            dtype=self._dtype.str,
            vocab_size=self._vocab_size,
            eod=self._eod,
            tokens=self._offsets[-1],
            documents=self.documents,
            bytes=self._bytes,
            masked=self._masked,
        )
        self._file.seek(_HEADER + header.token_bytes)
        self._file.write(np.array(self._offsets, dtype="<i8").tobytes())
        self._file.seek(0)
        self._file.write(json.dumps({"format": _FORMAT, **asdict(header)}, indent=1).encode())

    def _write(self, ids: NDArray[np.integer[Any]]) -> None:
        if self._masked and ids.dtype == np.int64:
            ids = np.where(ids < 0, ~ids | self._unused, ids)
        raw = ids.astype(self._dtype, copy=False).tobytes()
        self._digest.update(raw)
        self._file.write(raw)


@contextmanager
def write_store(
    path: Path, *, vocab_size: int, eod: int, fingerprint: str, masked: bool = False
) -> Iterator[StoreWriter]:
    """A writer whose store appears at `path` whole, or, when the block raises, not at all."""
    # Host and process in the name: builders that do not see each other's lock must not share a file.
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            writer = StoreWriter(file, vocab_size=vocab_size, eod=eod, masked=masked)
            yield writer
            writer.finish(fingerprint)
            file.flush()
            os.fsync(file.fileno())  # the name must not reach the disk before the content
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_header(path: Path) -> Header:
    try:
        with path.open("rb") as file:
            said = json.loads(file.read(_HEADER))
        if said.pop("format") != _FORMAT or set(said) != {f.name for f in fields(Header)}:
            raise ValueError("another format")
        return Header(**said)
    except OSError as error:
        raise DataError(f"cannot read the token store {path}: {error.strerror}") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is no token store of format {_FORMAT!r} ({error}); delete it") from error
