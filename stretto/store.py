"""Requests to the rendezvous store that end in time, and what all ranks together say over it.

A `TCPStore` waits for its server without end: when the link to it is cut, so does every rank that asks. `TimedStore`
gives each request a deadline. `combine` is a reduction over the store in which nobody waits: a rank sends a few
messages of bounded size, however many ranks there are.

Nothing that is read from a store is trusted: values are text or JSON, never a pickle, see `read_json`.
"""

from __future__ import annotations

import json
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from typing import Any, TypeVar

from torch.distributed import DistStoreError, PrefixStore, Store  # type: ignore[attr-defined]

T = TypeVar("T")

REQUEST_SECONDS = 8.0
"""How long one request may take: far more than a busy server needs for thousands of ranks."""

FAN = 16
"""How many values `combine` joins at once."""

LARGEST = 2**20
"""Bytes of JSON, at most, that are read: a report of a rank is far smaller."""


class LostError(RuntimeError):
    """A peer does not answer, or did not come: says no more than that, so that who it is may still be found out."""


class StoreLostError(LostError):
    """The store did not answer a request in time."""


class TimedStore:
    """A store whose requests each end within `seconds`, waits within their own time and `seconds` more.

    Raises `StoreLostError` when they do not; then every later request does at once, as the first one still holds the
    connection. `torch.distributed.DistError` as the store itself does.
    """

    def __init__(self, store: Store, seconds: float = REQUEST_SECONDS, line: _Line | None = None) -> None:
        self.store, self.seconds = store, seconds
        self._line = line or _Line()

    @classmethod
    def over(cls, store: Store | TimedStore) -> TimedStore:
        """This store with deadlines, if it has none yet."""
        return store if isinstance(store, TimedStore) else cls(store)

    def under(self, prefix: str) -> TimedStore:
        """A part of it, over the same connection."""
        return TimedStore(PrefixStore(prefix, self.store), self.seconds, self._line)

    def set(self, key: str, value: str) -> None:
        """Write."""
        # The server answers nothing to `set`; whether it heard, the next request will tell.
        self._line.ask(lambda: self.store.set(key, value), self.seconds)

    def get(self, key: str) -> bytes:
        """The value of a key that is there."""
        return self._line.ask(lambda: self.store.get(key), self.seconds)

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """The values of keys that are there."""
        return self._line.ask(lambda: self.store.multi_get(list(keys)), self.seconds) if keys else []

    def add(self, key: str, amount: int) -> int:
        """Add to a counter; its new value."""
        return self._line.ask(lambda: self.store.add(key, amount), self.seconds)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys are there."""
        return self._line.ask(lambda: self.store.check(list(keys)), self.seconds)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Write unless somebody did before; what stands there now."""
        return self._line.ask(lambda: self.store.compare_set(key, expected, desired), self.seconds)

    def delete_key(self, key: str) -> bool:
        """Remove."""
        return self._line.ask(lambda: self.store.delete_key(key), self.seconds)

    def wait(self, key: str, seconds: float) -> bool:
        """Whether a key is there within so many seconds; the server tells, nobody polls."""

        def wait() -> bool:
            try:
                self.store.wait([key], timedelta(seconds=max(seconds, 0.01)))
            except DistStoreError as error:
                if "timeout" in str(error):
                    return False
                raise
            return True

        return self._line.ask(wait, max(seconds, 0.0) + self.seconds)

    def poll(self, key: str, seconds: float) -> bool:
        """The same by asking: for the one rank that watches over the time, as torch warns of a wait in vain."""
        return until(lambda: self.check([key]), time.monotonic() + seconds)


class _Line:
    """One thread that makes the requests of one connection, one after the other."""

    def __init__(self) -> None:
        self._lock, self._lost = Lock(), False
        self._asked: SimpleQueue[tuple[Callable[[], Any], SimpleQueue[Any]] | None] = SimpleQueue()
        Thread(target=_serve, args=(self._asked,), name="stretto-store", daemon=True).start()
        weakref.finalize(self, self._asked.put, None)

    def ask(self, request: Callable[[], T], seconds: float) -> T:
        with self._lock:
            if self._lost:
                raise StoreLostError("the rendezvous store does not answer any more")
            answer: SimpleQueue[tuple[T, None] | tuple[None, Exception]] = SimpleQueue()
            self._asked.put((request, answer))
            try:
                value, error = answer.get(timeout=seconds)
            except Empty:
                self._lost = True
                raise StoreLostError(f"the rendezvous store did not answer within {seconds:g} s") from None
        if error is not None:
            raise error
        return value  # type: ignore[return-value]  # the request has returned it


def _serve(asked: SimpleQueue[tuple[Callable[[], Any], SimpleQueue[Any]] | None]) -> None:
    while (next_one := asked.get()) is not None:
        request, answer = next_one
        try:
            answer.put((request(), None))
        except Exception as error:  # noqa: BLE001  # it is raised where the answer is waited for
            answer.put((None, error))
        del request, answer, next_one


def in_time(call: Callable[[], T], seconds: float) -> T:
    """What a call returns or raises that may take longer than we have; TimeoutError when it does.

    A name service that is down has time-outs of its own, and making a client of the store has none.
    """
    answer: SimpleQueue[Any] = SimpleQueue()
    asked: SimpleQueue[tuple[Callable[[], Any], SimpleQueue[Any]] | None] = SimpleQueue()
    asked.put((call, answer))
    asked.put(None)
    Thread(target=_serve, args=(asked,), daemon=True).start()
    try:
        result, error = answer.get(timeout=seconds)
    except Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def read_json(value: bytes) -> Any:
    """What a value of a store says. Raises ValueError when it is too long or no JSON: anybody may have written it."""
    if len(value) > LARGEST:
        raise ValueError(f"{len(value)} bytes, more than any rank writes")
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from None


def combine(
    store: TimedStore, rank: int, size: int, value: str, merge: Callable[[list[bytes]], str] = lambda _: ""
) -> str | None:
    """The values of all ranks, merged, on the rank that comes last; None on the others. Nobody waits.

    Ranks come in blocks of `FAN`: the last of a block merges its values into one and goes on for it to the next level.
    So a rank sends 2 messages, and who is last of everything 3 for each of log_16(size) levels. `merge` takes values
    in the order of the ranks and keeps their size bounded. `store` serves one `combine`.
    """
    level, place = 0, rank
    while True:
        store.set(f"{level}/{place}", value)
        if size == 1:
            return value
        block, members = _block(place, size)
        if store.add(f"{level}/{block}/here", 1) != len(members):
            return None
        value = merge(store.multi_get([f"{level}/{i}" for i in members]))
        level, place, size = level + 1, block, -(-size // FAN)


def absent(store: TimedStore, size: int) -> list[int]:
    """The ranks that did not come to a `combine`, read from the top: a few messages for each of them.

    Where a whole subtree did not come, it is not asked further than to its ranks.
    """
    sizes = [size]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // FAN))
    missing = [0]
    for level in reversed(range(len(sizes))):
        missing = [place for place in missing if not store.check([f"{level}/{place}"])]
        if level:
            missing = [place for block in missing for place in _block(block * FAN, sizes[level - 1])[1]]
    return missing


def _block(place: int, size: int) -> tuple[int, range]:
    """The block of a place, and the places in it."""
    block = place // FAN
    return block, range(block * FAN, min((block + 1) * FAN, size))


def until(done: Callable[[], bool], deadline: float) -> bool:
    """Poll, at first quickly, then sparingly; whether it was done in time. For one rank, or for what is not a store."""
    pause = 0.01
    while not done():
        if (left := deadline - time.monotonic()) <= 0:
            return False
        time.sleep(min(pause, left))
        pause = min(pause * 1.5, 0.5)
    return True


@contextmanager
def last_resort(seconds: float, text: Callable[[], str]) -> Iterator[None]:
    """End the process, with `text` on standard error, if the body is not done after so many seconds.

    For what cannot be interrupted: a back end that creates a group waits for the store for ever when the link is cut.
    """
    done = Event()

    def watch() -> None:
        if not done.wait(seconds):
            sys.stderr.write(f"\n{text()}\n")
            sys.stderr.flush()
            os._exit(1)

    Thread(target=watch, name="stretto-last-resort", daemon=True).start()
    try:
        yield
    finally:
        done.set()
