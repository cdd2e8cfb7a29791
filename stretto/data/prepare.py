"""From a corpus and a tokenizer to two open token stores, built once for each file system.

Every rank calls `prepare`. The first builds, under a lock; the others wait for it. The name of the cache
holds a hash of all that the tokens depend on, so a changed corpus has another name and nothing is stale.
The lock saves work and is not needed to be right: a store appears by one atomic rename, so that on a file
system without locks two builders only do the same work twice.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from stretto.data.corpus import Corpus, Document, position
from stretto.data.errors import DataError
from stretto.data.store import TokenStore, write_store
from stretto.data.tokenizer import Tokenizer

_CHUNK = 1 << 22  # characters tokenized at a time
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}  # what a file system without locks answers


@dataclass(frozen=True)
class Splits:
    """The documents to learn from and those held out, as tokens."""

    train: TokenStore
    held_out: TokenStore


def prepare(
    corpus: Corpus, tokenizer: Tokenizer, *, held_out: float, cache: str | Path, timeout: float = 600.0
) -> Splits:
    """The two stores of a corpus, from `cache` or built there.

    `held_out` is the fraction of documents to hold out, in [0, 1). With 0 the held-out store is empty.
    `timeout` is how many seconds to wait while another process builds.
    Raises DataError on a corpus that cannot be read or split, an unusable cache, or at the time-out.
    """
    if not 0 <= held_out < 1:
        raise DataError(f"data.held_out={held_out} is no fraction in [0, 1); 0.05 is usual")
    key = _key(corpus, tokenizer, held_out)
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", corpus.label)
    folder = Path(cache).expanduser() / f"{label}-{key[:16]}"
    if found := _open(folder, key):
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock", timeout):
            if found := _open(folder, key):  # built while this process waited
                return found
            _build(folder, key, corpus, tokenizer, held_out)
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror}; set data.cache to a place with room") from error
    return Splits(TokenStore.open(folder / "train"), TokenStore.open(folder / "held_out"))


def _key(corpus: Corpus, tokenizer: Tokenizer, held_out: float) -> str:
    parts = (str(corpus.root.resolve()), corpus.fingerprint(), tokenizer.fingerprint, repr(float(held_out)))
    return hashlib.blake2b("\0".join(parts).encode(errors="surrogateescape"), digest_size=16).hexdigest()


def _open(folder: Path, key: str) -> Splits | None:
    """Both stores, or None when either is missing, damaged or made from something else."""
    try:
        splits = Splits(TokenStore.open(folder / "train"), TokenStore.open(folder / "held_out"))
    except DataError:
        return None
    return splits if splits.train.header.fingerprint == splits.held_out.header.fingerprint == key else None


def _build(folder: Path, key: str, corpus: Corpus, tokenizer: Tokenizer, held_out: float) -> None:
    new = partial(write_store, vocab_size=tokenizer.vocab_size, eod=tokenizer.eod, fingerprint=key)
    lowest, highest = 1.0, 0.0
    with new(folder / "train") as train, new(folder / "held_out") as held:
        for documents in _chunks(corpus.documents()):
            encoded = tokenizer.encode_all([document.text for document in documents])
            for document, ids in zip(documents, encoded, strict=True):
                where = position(document.name)
                lowest, highest = min(lowest, where), max(highest, where)
                (held if where < held_out else train).add(ids, len(document.text.encode("utf-8")))
        _check_split(corpus, train.documents, held.documents, held_out, lowest, highest)


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """The documents in lists of about `_CHUNK` characters: work for all cores, and a bound on memory."""
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _check_split(corpus: Corpus, train: int, held: int, held_out: float, lowest: float, highest: float) -> None:
    """Raise DataError when a side is empty; `lowest`, `highest`: the outermost positions of documents."""
    total = train + held
    if total == 0:
        raise DataError(f"none of the {len(corpus.files)} files in {corpus.root} has any UTF-8 text")
    if total == 1:
        raise DataError(f"{corpus.root} has 1 document, which cannot be split; bring more, or a .jsonl of many")
    if held == 0 and held_out > 0:
        raise DataError(
            f"data.held_out={held_out} holds out none of the {total} documents in {corpus.root}; "
            f"data.held_out={_above(lowest)} holds out at least one, 0 goes without"
        )
    if train == 0:
        raise DataError(
            f"data.held_out={held_out} holds out all {total} documents in {corpus.root}; "
            f"data.held_out={_below(highest)} leaves some to train on"
        )


def _above(x: float) -> float:
    """A short number above x."""
    return (int(x * 1000) + 1) / 1000


def _below(x: float) -> float:
    """A short number at or below x."""
    return int(x * 1000) / 1000


@contextmanager
def _locked(path: Path, timeout: float) -> Iterator[None]:
    """Hold the lock file at `path`. The kernel frees it when its holder dies, so none is ever left behind."""
    deadline = time.monotonic() + timeout
    with path.open("a+") as file:
        while not _try_lock(file.fileno()):
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise DataError(
                    f"waited {timeout:g} s for {holder} to build {path.parent}; "
                    "end it, or build beforehand with `stretto data build`"
                )
            time.sleep(0.05)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True
