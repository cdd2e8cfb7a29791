"""Tokens that Megatron-LM's `preprocess_data.py` has made: a `.bin` of token ids, and an `.idx` that says where its
documents begin. Both are mapped, not copied.

The index came from elsewhere, so nothing in it is believed: its size follows from its counts, the pieces that it
names lie end to end and fill the `.bin`, and every id is an entry of the vocabulary. All tokens are read for that once,
and for their digest; what was found is kept in the cache.

    idx   "MMIDIDX\\0\\0", version u64 = 1, dtype u8, sequences u64, documents + 1 u64
          lengths [sequences] i32, places in bytes [sequences] i64, first sequences [documents + 1] i64
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from stretto.data.account import Account
from stretto.data.errors import DataError
from stretto.data.files import open_regular
from stretto.data.lock import Lock, Progress, Tell
from stretto.data.prepare import Splits
from stretto.data.store import Header, TokenStore
from stretto.data.tokenizer import Tokenizer

_MAGIC: Final = b"MMIDIDX\x00\x00"
_HEAD: Final = struct.Struct("<9sQBQQ")
_DTYPES: Final = MappingProxyType({1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"})
_BLOCK: Final = 1 << 22
"""Entries looked at, or tokens hashed, at a time."""


@dataclass(frozen=True)
class IndexedTokens:
    """The two files `prefix`.bin and `prefix`.idx."""

    prefix: Path

    @classmethod
    def at(cls, path: str) -> IndexedTokens | None:
        """Where `path` is either file, or what both begin with. Raises DataError where one of the two is missing."""
        where = Path(path).expanduser()
        prefix = where.with_suffix("") if where.suffix in (".bin", ".idx") else where
        missing = [end for end in (".bin", ".idx") if not Path(f"{prefix}{end}").exists()]
        if not missing and not where.is_dir():
            return cls(prefix)
        if prefix != where and where.exists():
            raise DataError(f"{where} are tokens without {prefix}{missing[0]}; both files are needed")
        return None

    @property
    def label(self) -> str:
        """Its name without directories."""
        return self.prefix.name

    @property
    def tokens(self) -> Path:
        """The token ids."""
        return Path(f"{self.prefix}.bin")

    @property
    def index(self) -> Path:
        """What says where they belong."""
        return Path(f"{self.prefix}.idx")

    def size(self) -> int:
        """Bytes of the tokens. Raises DataError when they are gone."""
        return _stat(self.tokens).st_size

    def offsets(self) -> tuple[str, NDArray[np.int64]]:
        """The dtype of the ids, and where each document begins, then where the last ends [documents + 1].

        Raises DataError where the index contradicts itself or the tokens.
        """
        try:
            with open_regular(self.index) as file:
                raw = file.read(_HEAD.size)
                size = os.fstat(file.fileno()).st_size
            if len(raw) < _HEAD.size or raw[:9] != _MAGIC:
                raise self._bad("it does not begin with MMIDIDX")
            _, version, code, sequences, ends = _HEAD.unpack(raw)
            if version != 1 or code not in _DTYPES:
                raise self._bad(f"version {version} with dtype {code}; ids are whole numbers, in version 1")
            if ends == 0 or _HEAD.size + 12 * sequences + 8 * ends != size:
                raise self._bad(f"{sequences} sequences and {ends} ends of documents do not make {size} bytes")
            lengths = self._mapped("<i4", _HEAD.size, sequences)
            places = self._mapped("<i8", _HEAD.size + 4 * sequences, sequences)
            first = self._mapped("<i8", _HEAD.size + 12 * sequences, ends)
        except OSError as error:
            raise DataError(f"cannot read {self.index}: {error.strerror}") from error
        item = np.dtype(_DTYPES[code]).itemsize
        total = self._check_places(lengths, places, item)
        if first[0] != 0 or first[-1] != sequences or (np.diff(first) < 0).any():
            raise self._bad(f"its documents are not sequences 0 to {sequences} in order")
        begins = np.append(np.asarray(places) // item, total)
        return _DTYPES[code], begins[np.asarray(first)]

    def _check_places(self, lengths: NDArray[Any], places: NDArray[Any], item: int) -> int:
        """The tokens in all; sequences must lie end to end."""
        at = 0
        for start in range(0, len(lengths), _BLOCK):
            some = np.asarray(lengths[start : start + _BLOCK], dtype=np.int64)
            ends = at + np.cumsum(some)
            if (some < 0).any() or not np.array_equal(places[start : start + _BLOCK], (ends - some) * item):
                raise self._bad("its sequences do not lie end to end")
            at = int(ends[-1])
        if at * item != self.size():
            raise self._bad(f"{at} tokens of {item} bytes are not the {self.size()} bytes of {self.tokens}")
        return at

    def _mapped(self, dtype: str, offset: int, n: int) -> NDArray[Any]:
        return np.memmap(self.index, dtype=dtype, mode="r", offset=offset, shape=(n,)) if n else np.zeros(0, dtype)

    def _bad(self, why: str) -> DataError:
        return DataError(f"{self.index} is no index of tokens that can be used: {why}")


def prepare_indexed(
    made: IndexedTokens, tokenizer: Tokenizer, *, held_out: float, cache: str | Path, tell: Tell, timeout: float = 600.0
) -> Splits:
    """Both sides of tokens that are made; the last documents are held out, as they lie.

    Raises DataError where they cannot be used with this tokenizer.
    """
    dtype, offsets = made.offsets()
    cut = _cut(made, len(offsets) - 1, held_out)
    stats = [(str(path.resolve()), _stat(path).st_size, _stat(path).st_mtime_ns) for path in (made.tokens, made.index)]
    key = hashlib.blake2b(json.dumps([stats, tokenizer.fingerprint, cut]).encode(), digest_size=16).hexdigest()
    folder = Path(cache).expanduser() / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', made.label)[:80]}-{key[:16]}"
    tokens = np.memmap(made.tokens, dtype=dtype, mode="r") if offsets[-1] else np.zeros(0, dtype)
    sides = [(0, cut), (cut, len(offsets) - 1)]
    try:
        digests = _known(folder / "digests.json", key)
        if digests is None:
            folder.mkdir(parents=True, exist_ok=True)
            with Lock.opened(folder / "lock") as lock:
                lock.wait(timeout, tell)
                digests = _known(folder / "digests.json", key) or _digests(
                    made, tokens, [(int(offsets[a]), int(offsets[b])) for a, b in sides], tokenizer, lock, tell
                )
                temporary = folder / f"digests.json.{os.getpid()}.tmp"
                temporary.write_text(json.dumps([key, *digests]))
                temporary.replace(folder / "digests.json")
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror}; name a place with room by --cache") from error
    stores = []
    for (a, b), digest in zip(sides, digests, strict=True):
        start, stop = int(offsets[a]), int(offsets[b])
        head = Header(key, digest, dtype, tokenizer.vocab_size, tokenizer.eod, stop - start, b - a, bytes=0)
        stores.append(TokenStore(made.tokens, head, tokens[start:stop], offsets[a : b + 1] - start))
    return Splits(stores[0], stores[1], Account())


def _cut(made: IndexedTokens, documents: int, held_out: float) -> int:
    """How many documents to train on. Raises DataError when a side would be empty."""
    if documents == 0:
        raise DataError(f"{made.index} has no documents")
    held = max(1, round(documents * held_out)) if held_out else 0
    if held >= documents:
        raise DataError(
            f"--held-out {held_out} leaves none of the {documents} documents in {made.index} to train on; "
            "--held-out 0 trains on all"
        )
    return documents - held


def _digests(
    made: IndexedTokens,
    tokens: NDArray[Any],
    sides: list[tuple[int, int]],
    tokenizer: Tokenizer,
    lock: Lock,
    tell: Tell,
) -> list[str]:
    """A hash of the tokens of each side. Raises DataError at an id that is not in the vocabulary."""
    found = []
    for start, stop in sides:
        digest = hashlib.blake2b(digest_size=16)
        for block in _blocks(tokens, start, stop):
            low, high = int(block.min()), int(block.max())
            if low < 0 or high >= tokenizer.vocab_size:
                raise DataError(
                    f"{made.tokens} has token ids {low}..{high}, but the tokenizer {tokenizer.name} has "
                    f"{tokenizer.vocab_size} entries; name the one that made them with --tokenizer"
                )
            digest.update(block.tobytes())
            start += len(block)
            lock.say(start, len(tokens))
            tell(Progress(start * tokens.itemsize, len(tokens) * tokens.itemsize, "this process"))
        found.append(digest.hexdigest())
    return found


def _blocks(tokens: NDArray[Any], start: int, stop: int) -> Iterator[NDArray[Any]]:
    for at in range(start, stop, _BLOCK):
        yield np.asarray(tokens[at : min(at + _BLOCK, stop)])


def _known(path: Path, key: str) -> list[str] | None:
    """The digests found before; None when there are none, or none of these files."""
    try:
        said, *digests = json.loads(path.read_text())
        whole = said == key and len(digests) == 2 and all(isinstance(digest, str) for digest in digests)
    except (OSError, ValueError, TypeError):
        return None
    return digests if whole else None


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
