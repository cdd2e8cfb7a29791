"""From a corpus and a tokenizer to two open token stores, built once for each file system.

Any process may call `prepare`: of a run few ranks do, see `stretto.train.shared_text`. The first builds, under a lock;
others wait as long as it gets on. The name of the cache holds a hash of all that the tokens depend on, so a changed
corpus has another name and nothing is stale. The lock saves work and is not needed to be right: a store appears by one
atomic rename, so that on a file system without locks two builders only do the same work twice.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, Final

from stretto.data.account import Account
from stretto.data.baselines import baselines
from stretto.data.corpus import Corpus
from stretto.data.errors import DataError
from stretto.data.lock import Lock, Progress, Tell
from stretto.data.parts import Done, Job, plan, work
from stretto.data.store import TokenStore
from stretto.data.tokenizer import Tokenizer
from stretto.data.workers import WorkerEndedError, run_workers

_READING: Final = "3"  # changes when the same files give other documents

MOST_LOST: Final = 0.01
"""The share of the text that a tokenizer may lose, unless the user says otherwise."""


@dataclass(frozen=True)
class Splits:
    """The documents to learn from and those held out, as tokens, and what else is known of them."""

    train: TokenStore
    held_out: TokenStore
    account: Account

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Splits:
        """What `as_json` says, where its files are here. Raises DataError where they are not, or are others."""
        try:
            sides = [(Path(said[side]["path"]), str(said[side]["digest"])) for side in ("train", "held_out")]
            account = Account.from_json(said["account"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"no splits of a corpus: {error!r}") from error
        train, held_out = (TokenStore.open(path) for path, _ in sides)
        for store, (path, digest) in zip((train, held_out), sides, strict=True):
            if store.header.digest != digest:
                raise DataError(f"{path} has other tokens here")
        return cls(train, held_out, account)

    def as_json(self) -> dict[str, Any]:
        """Where the stores are and what is known of them, for other processes of this file system."""
        stores = {"train": self.train, "held_out": self.held_out}
        sides = {side: {"path": str(s.path.absolute()), "digest": s.header.digest} for side, s in stores.items()}
        return {**sides, "account": self.account.as_json()}


def _unheard(progress: Progress) -> None:
    """Tell nobody."""


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    held_out: float,
    cache: str | Path,
    timeout: float = 600.0,
    most_lost: float = MOST_LOST,
    workers: int = 1,
    tell: Tell = _unheard,
) -> Splits:
    """The two stores of a corpus, from `cache` or built there.

    Args:
        held_out: the fraction of documents to hold out, in [0, 1). With 0 the held-out store is empty.
        timeout: seconds without any progress after which one who waits for another builder gives up.
        most_lost: the share of the text that the tokenizer may fail to give back.
        workers: processes that tokenize; 1: this one, with the tokenizer's own threads. With more, one that finds
            another builder at work helps it.
        tell: called as the work gets on, whoever does it.

    Raises:
        DataError: a corpus that cannot be read or split, a tokenizer that loses too much of it, an unusable cache, a
            builder that does not get on.
    """
    if not 0 <= held_out < 1:
        raise DataError(f"--held-out {held_out} is no fraction in [0, 1); 0.05 is usual")
    key = _key(corpus, tokenizer, held_out)
    folder = _folder(corpus, key, cache)
    splits = _open(folder, key) or _prepared(folder, key, corpus, tokenizer, held_out, timeout, workers, tell)
    lost = splits.account.lost
    if lost.share > most_lost:
        raise DataError(
            f"the tokenizer {tokenizer.name} loses {lost}: more than data.max_lost={most_lost:g}; "
            f"take one that has tokens for all bytes, or allow it with --max-lost {_above(lost.share)}"
        )
    return splits


def find(corpus: Corpus, tokenizer: Tokenizer, *, held_out: float, cache: str | Path) -> Splits | None:
    """What `prepare` has built before, if it has. Raises DataError when a file of the corpus is gone."""
    key = _key(corpus, tokenizer, held_out)
    return _open(_folder(corpus, key, cache), key)


def _folder(corpus: Corpus, key: str, cache: str | Path) -> Path:
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", corpus.label)[:80]
    return Path(cache).expanduser() / f"{label}-{key[:16]}"


def _key(corpus: Corpus, tokenizer: Tokenizer, held_out: float) -> str:
    root = str(corpus.root.resolve())
    parts = (_READING, root, corpus.fingerprint(), tokenizer.fingerprint, repr(float(held_out)))
    return hashlib.blake2b("\0".join(parts).encode(errors="surrogateescape"), digest_size=16).hexdigest()


def _open(folder: Path, key: str) -> Splits | None:
    """Both stores and the account, or None when one is missing, damaged or made from something else."""
    try:
        train, held_out = (TokenStore.open(folder / name) for name in ("train", "held_out"))
        splits = Splits(train, held_out, Account.read(folder / "account.json", key))
    except DataError:
        return None
    return splits if train.header.fingerprint == held_out.header.fingerprint == key else None


def _prepared(
    folder: Path,
    key: str,
    corpus: Corpus,
    tokenizer: Tokenizer,
    held_out: float,
    timeout: float,
    workers: int,
    tell: Tell,
) -> Splits:
    """The stores, built here or by another process meanwhile."""
    try:
        parts = folder / "parts"
        parts.mkdir(parents=True, exist_ok=True)
        job = Job(parts, key, corpus, tokenizer, held_out, plan(corpus))
        with Lock.opened(folder / "lock") as lock:
            if not lock.take():
                if workers > 1:
                    # What goes wrong is for the builder to say: it may also have finished and removed the parts.
                    with suppress(DataError, OSError):
                        _tokenize(job, workers, timeout, _teller(job, tell))
                lock.wait(timeout, tell)
            if found := _open(folder, key):  # built while this process waited
                shutil.rmtree(parts, ignore_errors=True)
                return found
            _build(folder, job, lock, workers, timeout, tell)
    except OSError as error:
        if found := _open(folder, key):  # another one, on a file system without locks, was quicker
            return found
        raise DataError(
            f"cannot write {folder}: {error.strerror or error}; name a place with room by --cache"
        ) from error
    built = _open(folder, key)
    if built is None:
        raise DataError(f"{folder} was removed or overwritten as soon as it was built; try again")
    return built


def _build(folder: Path, job: Job, lock: Lock, workers: int, timeout: float, tell: Tell) -> None:
    """Tokenize what is missing, join the parts, and leave nothing else behind."""
    if lock.alone:
        for left in folder.glob("*.tmp"):
            left.unlink(missing_ok=True)

    def heard(progress: Progress) -> None:
        lock.say(progress.done, progress.total)
        tell(progress)

    try:
        account = _joined(folder, job, lock, workers, timeout, heard)
    except WorkerEndedError:
        raise
    except DataError:  # the text or what was asked of it will change, so these parts serve nobody
        shutil.rmtree(job.folder, ignore_errors=True)
        raise
    account.write(folder / "account.json", job.key)
    shutil.rmtree(job.folder, ignore_errors=True)


def _joined(folder: Path, job: Job, lock: Lock, workers: int, timeout: float, tell: Tell) -> Account:
    """The whole stores, from parts; and their account."""
    _tokenize(job, workers, timeout, _teller(job, tell))
    account = reduce(add, filter(None, map(job.account, range(len(job.parts)))), Account(passed=job.corpus.passed))
    with job.written(folder / "train") as train, job.written(folder / "held_out") as held:
        for part in range(len(job.parts)):
            train.extend(job.open(part, "train"))
            held.extend(job.open(part, "held_out"))
            lock.say(part, len(job.parts))
        _check_split(job.corpus, account, train.documents, held.documents, job.held_out)
    if job.held_out and not job.tokenizer.masks:
        account = replace(account, baselines=baselines(job.corpus, job.held_out))
    if _key(job.corpus, job.tokenizer, job.held_out) != job.key:
        raise DataError(f"files in {job.corpus.root} changed while they were read; run it again")
    return account


def _tokenize(job: Job, workers: int, timeout: float, done: Done) -> None:
    if workers > 1 and len(job.parts) > 1:
        run_workers(job, min(workers, len(job.parts)), done, timeout)
    else:
        work(job, done, timeout)


def _teller(job: Job, tell: Tell) -> Done:
    """Tells of the whole what is told of parts."""
    sizes = [part.size for part in job.parts]
    reached = [0 if job.account(part) is None else sizes[part] for part in range(len(sizes))]
    total = sum(sizes)
    tell(Progress(sum(reached), total, "this process"))

    def done(part: int, size: int) -> None:
        reached[part] = size
        tell(Progress(sum(reached), total, "this process"))

    return done


def _check_split(corpus: Corpus, account: Account, train: int, held: int, held_out: float) -> None:
    """Raise DataError when a side is empty that should not be."""
    total = train + held
    if total == 0:
        beside = f" ({account.passed})" if account.passed.total else ""
        raise DataError(f"none of the {len(corpus.files)} files in {corpus.place} has any text{beside}")
    if held_out == 0:
        return
    if total == 1:
        raise DataError(
            f"{corpus.place} has 1 document, which cannot be split; --held-out 0 trains on it and evaluates nothing, "
            "or bring more documents, or a .jsonl of many"
        )
    if held == 0:
        raise DataError(
            f"--held-out {held_out} holds out none of the {total} documents in {corpus.place}; "
            f"--held-out {_above(account.lowest)} holds out at least one, --held-out 0 goes without"
        )
    if train == 0:
        raise DataError(
            f"--held-out {held_out} holds out all {total} documents in {corpus.place}; "
            f"--held-out {_below(account.highest)} leaves some to train on"
        )


def _above(x: float) -> float:
    """A short number above x."""
    return (int(x * 1000) + 1) / 1000


def _below(x: float) -> float:
    """A short number at or below x."""
    return int(x * 1000) / 1000
