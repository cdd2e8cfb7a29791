"""A corpus in parts, each tokenized by itself and kept: a kill loses only the parts under way.

The parts are a function of the files alone. Each leaves two token stores and, written last, an account; a lock of its
own says who is at it, so that any number of processes, on one node or several, share the work by looking at the
directory. In the end the parts are joined in order, so the tokens do not depend on who made which.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from stretto.data.account import Account
from stretto.data.columns import row_groups
from stretto.data.corpus import Corpus, position
from stretto.data.errors import DataError
from stretto.data.files import PassedOver, open_regular
from stretto.data.formats import Document, Piece, is_record, read, suffixes
from stretto.data.lock import Lock
from stretto.data.lost import Lost
from stretto.data.store import StoreWriter, TokenStore, write_store
from stretto.data.tokenizer import Tokenizer

_PART = 1 << 24  # bytes of text: some ten seconds of one core
_CHUNK = 1 << 22  # characters tokenized at a time
_COMPARED = 1 << 18  # bytes of each part's text to train on that are decoded and compared
_BLOCK = 1 << 22  # bytes read at a time to find the ends of lines

Done = Callable[[int, int], None]
"""Told of a part, and how many bytes of its text are done."""


@dataclass(frozen=True)
class Part:
    """Files and pieces of files, and how many bytes they have."""

    pieces: tuple[Piece, ...]
    size: int


@dataclass(frozen=True)
class Job:
    """A corpus to tokenize into `folder`; `key` names all that the tokens depend on."""

    folder: Path
    key: str
    corpus: Corpus
    tokenizer: Tokenizer
    held_out: float
    parts: tuple[Part, ...]

    def store(self, part: int, side: str) -> Path:
        """Where the tokens of a part lie."""
        return self.folder / f"{part:06}.{side}"

    def account(self, part: int) -> Account | None:
        """Of a part that is done and whole, else None."""
        try:
            for side in ("train", "held_out"):
                self.open(part, side)
            return Account.read(self.folder / f"{part:06}.json", self.key)
        except DataError:
            return None

    def written(self, path: Path) -> AbstractContextManager[StoreWriter]:
        """A store of this job's tokens, which appears at `path` whole."""
        tokenizer = self.tokenizer
        return write_store(
            path,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
            fingerprint=self.key,
            masked=tokenizer.masks,
        )

    def open(self, part: int, side: str) -> TokenStore:
        """The tokens of a part. Raises DataError when they are damaged or made from something else."""
        store = TokenStore.open(self.store(part, side))
        if store.header.fingerprint != self.key:
            raise DataError(f"{store.path} was made from something else")
        return store


def plan(corpus: Corpus) -> tuple[Part, ...]:
    """The parts of a corpus, in the order of its documents. A large file of lines is cut between lines."""
    parts: list[Part] = []
    pieces: list[Piece] = []
    size = 0
    for file in corpus.files:
        for piece, length in _pieces(corpus, file):
            pieces.append(piece)
            size += length
            if size >= _PART:
                parts.append(Part(tuple(pieces), size))
                pieces, size = [], 0
    return (*parts, Part(tuple(pieces), size)) if pieces else tuple(parts)


def work(job: Job, done: Done, timeout: float) -> None:
    """Make parts, with whoever else is at it, until all are there. Raises DataError when nobody gets on."""
    left = [part for part in range(len(job.parts)) if job.account(part) is None]
    since = time.monotonic()
    while left:
        before = len(left)
        for part in left:
            with Lock.opened(job.folder / f"{part:06}.lock") as lock:
                if lock.take() and job.account(part) is None:
                    make(job, part, done)
                    since = time.monotonic()
        left = [part for part in left if job.account(part) is None]
        if len(left) < before:
            since = time.monotonic()
        elif time.monotonic() - since > timeout:
            raise DataError(f"waited {timeout:g} s for others to tokenize part {left[0]} in {job.folder}; end them")
        else:
            time.sleep(0.2)


def make(job: Job, part: int, done: Done) -> None:
    """Tokenize one part. Raises DataError when its text cannot be read."""
    passed: list[tuple[str, str]] = []
    account, size = Account(), 0
    with ExitStack() as stack:
        train, held = (stack.enter_context(job.written(job.store(part, side))) for side in ("train", "held_out"))
        documents = _documents(job, part, lambda reason, name: passed.append((reason, name)))
        for chunk in chunks(documents):
            encoded = job.tokenizer.encode_all([document.text for document in chunk])
            for document, ids in zip(chunk, encoded, strict=True):
                where, length = position(document.name), len(document.text.encode("utf-8"))
                is_held = where < job.held_out
                # Of bytes that do not count no figure is made.
                (held if is_held else train).add(ids, 0 if job.tokenizer.masks else length)
                account = replace(account, lowest=min(account.lowest, where), highest=max(account.highest, where))
                if is_held:
                    account = replace(account, held_out=account.held_out + _lost(job.tokenizer, document, ids))
                elif account.train.of < _COMPARED:
                    account = replace(account, train=account.train + _lost(job.tokenizer, document, ids))
                size += length
            done(part, min(size, job.parts[part].size))
    replace(account, passed=PassedOver.of(passed)).write(job.folder / f"{part:06}.json", job.key)
    done(part, job.parts[part].size)


def chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
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


def _documents(job: Job, part: int, pass_over: Callable[[str, str], None]) -> Iterator[Document]:
    for piece in job.parts[part].pieces:
        yield from read(job.corpus.root, piece, job.corpus.text_key, pass_over)


def _lost(tokenizer: Tokenizer, document: Document, ids: object) -> Lost:
    if tokenizer.masks:  # a record is no text that a model sees
        return Lost()
    return Lost.between(document.text, tokenizer.decode(ids))  # type: ignore[arg-type]


def _pieces(corpus: Corpus, file: str) -> Iterator[tuple[Piece, int]]:
    """A file whole, or cut between lines where it is a large one of lines; and the bytes of each piece."""
    size, (suffix, packed) = corpus.stat(file).st_size, suffixes(file)
    if suffix == ".parquet" and not packed and size >= 2 * _PART:
        yield from _groups(corpus, file)
        return
    if packed or size < 2 * _PART or suffix not in (".jsonl", ".ndjson", ".json"):
        yield Piece(file), size
        return
    path = corpus.root / file
    try:
        with open_regular(path) as lines:
            if suffix == ".json" and not is_record(lines.readline(_PART), corpus.text_key):
                yield Piece(file), size
                return
            lines.seek(0)
            starts = [(0, 1), *((start, first) for start, first in _starts(lines) if start < size)]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    for (start, first), (stop, _) in zip(starts, [*starts[1:], (size, 0)], strict=True):
        yield Piece(file, start, stop, first), stop - start


def _groups(corpus: Corpus, file: str) -> Iterator[tuple[Piece, int]]:
    """The row groups of a large table, several small ones together."""
    path, begin, first, rows, size = corpus.root / file, 0, 1, 0, 0
    try:
        with open_regular(path) as table:
            groups = row_groups(path, table)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    for number, (count, length) in enumerate(groups, start=1):
        rows, size = rows + count, size + length
        if size >= _PART or number == len(groups):
            yield Piece(file, begin, number, first), size
            begin, first, rows, size = number, first + rows, 0, 0


def _starts(file: IO[bytes]) -> Iterator[tuple[int, int]]:
    """The first line that begins at or after each multiple of `_PART`: its place and its number."""
    at, line, due = 0, 1, _PART
    while block := file.read(_BLOCK):
        while (end := block.find(b"\n", max(due - at - 1, 0))) >= 0:
            start = at + end + 1
            yield start, line + block.count(b"\n", 0, end + 1)
            due = start + _PART
        line += block.count(b"\n")
        at += len(block)
