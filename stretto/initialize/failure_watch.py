"""When one rank fails, all end soon, and each shows the same cause last, whatever launched them.

Every rank has a thread that waits in the store for the next event, on a connection of its own: nobody polls. The rank
that fails publishes its traceback. A rank that has only lost a peer first calls the roll: who does not answer is the
cause, and is named on every rank. A rank that is stuck in a collective (NCCL waits for its time-out) is ended by its
thread. A rank that the store does not answer ends as well, and says which host it does not hear.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from threading import enumerate as enumerate_threads

from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

from stretto.collective_trace import CollectiveError
from stretto.initialize.failures import Failure, PeerFailedError, PeersSilentError, is_consequence
from stretto.initialize.roll_call import (
    ANSWER_SECONDS,
    Server,
    answer,
    call_roll,
    event,
    heard,
    introduce,
    leave,
    publish,
)
from stretto.initialize.torchrun import record
from stretto.store import LostError, TimedStore, combine

LEAVE_SECONDS = 5.0
"""How long a rank may take to leave by itself once another has failed; P15 allows 15 s for everything."""

LEARN_SECONDS = 2.0
"""How long a rank that lost a peer waits to hear why; how long who serves the store waits for the others to hear."""

END_SECONDS = 10.0
"""How long rank 0 waits at the end of a run for ranks that do not come there."""

REQUEST_SECONDS = 5.0
"""Of a request to the store when a run has failed."""

FOREVER = 365 * 86_400.0

WATCHING = "stretto-watch"

FIRST = "event/0"
"""Where the first event is published: all ranks wait for it."""


@contextmanager
def failing_with_peers(
    store: Store, rank: int, size: int, *, phase: Callable[[], str] = lambda: "", served_by: Server | None = None
) -> Iterator[None]:
    """Within, this rank's exceptions end the others, and theirs end this one.

    `phase` says what this rank is doing; `served_by` is where the store is, for who cannot reach it any more.
    Raises `PeerFailedError` in place of an exception that only says that a peer is gone, when it is known why, and
    `PeersSilentError` where this rank found out who it is.
    """
    ours = Ours(TimedStore(store, REQUEST_SECONDS), rank, size, phase, served_by or Server())
    introduce(ours.store, rank)
    watching = Thread(target=_watch, args=(ours, store), name=WATCHING, daemon=True)
    watching.start()
    try:
        yield
        with suppress(DistError, LostError):  # the store may have left before us: then there is nothing to tell it
            ours.end()
    except Exception as error:
        try:
            told = ours.conclude(error)
        except (DistError, LostError):  # of the store, which says no more of anybody
            told = ours.without_store(error)
        record(rank, told, phase=phase())
        if told is error:
            raise
        raise told from None
    finally:
        ours.left.set()
    watching.join(LEAVE_SECONDS)


class Ours:
    """What one rank knows of the run's end."""

    def __init__(self, store: TimedStore, rank: int, size: int, phase: Callable[[], str], served_by: Server) -> None:
        self.store, self.rank, self.size, self.phase, self.served_by = store, rank, size, phase, served_by
        self.left, self.told = Event(), Event()
        self.cause: Failure | None = None
        """What the watching thread has heard, once `told` is set."""

    def roll_call(self) -> PeersSilentError | None:
        """Who does not answer."""
        found = call_roll(self.store, self.size)
        return PeersSilentError(found.ranks, str(found), self.phase()) if found else None

    def conclude(self, error: Exception) -> Exception:
        """What this rank ends with: `error`, or the cause that it is a consequence of; the others are told."""
        lost = is_consequence(error) or (isinstance(error, CollectiveError) and bool(error.silent))
        if lost and self.told.wait(LEARN_SECONDS / 2):
            return self._heard()
        # Who has a table asks in any case: whether it stands depends on the answer.
        if lost and (isinstance(error, CollectiveError) or self._first("finder")):
            found = self.roll_call()
            if found is None and is_consequence(error) and self.told.wait(2 * LEARN_SECONDS):
                return self._heard()  # another rank knows where the ranks part ways
            error = found or error
        elif lost and self.told.wait(ANSWER_SECONDS + 2 * LEARN_SECONDS):
            return self._heard()
        if self._first("teller"):
            record(self.rank, error, phase=self.phase())  # before another rank can hear of it
            publish(self.store, Failure.of(self.rank, error, self.phase()).encode().decode())
        elif self.told.wait(LEARN_SECONDS) and is_consequence(error):
            return self._heard()
        self._linger()
        return error

    def _first(self, key: str) -> bool:
        """Whether no rank was here before."""
        return self.store.compare_set(key, "", str(self.rank)) == str(self.rank).encode()

    def _heard(self) -> Exception:
        assert self.cause is not None
        self._linger()
        return PeerFailedError(self.cause, self.phase())

    def _linger(self) -> None:
        """Rank 0 may serve the store, which ends with it: let the others hear first."""
        if self.rank == 0:
            self.store.poll("heard/all", LEARN_SECONDS)

    def without_store(self, error: Exception) -> Exception:
        """The store does not answer. A failure of our own is told all the same; else what we do not hear."""
        if self.told.is_set() and self.cause is not None:
            return PeerFailedError(self.cause, self.phase())
        if not is_consequence(error) and not isinstance(error, CollectiveError):
            return error
        return PeersSilentError((0,), self.served_by.silent_to(self.rank), self.phase())

    def end(self) -> None:
        """The run is over for this rank, when it is for all: PeersSilentError where a rank does not come here.

        Rank 0 asks who is still there; the others wait for as long as it may take to do so.
        """
        if combine(self.store.under("ends"), self.rank, self.size, "") is not None:
            publish(self.store, event("over", 0))
        leave(self.store, self.rank)
        if self.told.wait(END_SECONDS if self.rank == 0 else END_SECONDS + ANSWER_SECONDS + LEARN_SECONDS):
            if self.cause is not None:
                raise PeerFailedError(self.cause, self.phase())
        elif self.rank == 0 and (lost := self.roll_call()):
            raise lost


def leave_process(code: int) -> int:
    """The exit code; or its end with it, if threads of this module still wait in the store.

    As the interpreter ends, they would come back from there, and abort the process with another code.
    """
    if any(thread.name == WATCHING for thread in enumerate_threads()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _watch(ours: Ours, store: Store) -> None:
    """Answer roll calls, and end this process when another rank has failed and this one does not end by itself."""
    try:
        line = TimedStore(store.clone(), ours.store.seconds)  # type: ignore[attr-defined]  # nobody's wait blocks it
        number = 0
        while True:
            said = _read(next_event(line, number))
            number += 1
            if isinstance(said, Failure):
                ours.cause = said
                ours.told.set()
                if combine(line.under("heard"), ours.rank, ours.size, "") is not None:
                    line.set("heard/all", "")
                break
            kind, call = said
            if kind == "over":
                ours.told.set()
                return
            answer(line, call, ours.rank, ours.size)
    except (DistError, LostError):
        pass  # the store ended with who served it, or is not reached: whoever waits for a peer finds out in its time
    if ours.cause is not None and not ours.left.wait(LEAVE_SECONDS):
        sys.stderr.write(f"\n{PeerFailedError(ours.cause)}")
        sys.stderr.flush()
        os._exit(1)


def next_event(store: TimedStore, number: int) -> bytes:
    """The event of that number, once there is one."""
    store.wait(f"event/{number}", FOREVER)
    return store.get(f"event/{number}")


def _read(value: bytes) -> Failure | tuple[str, int]:
    """An event. What is none is not from a rank of ours: end all the same, since no rank could publish its own."""
    try:
        return heard(value) or Failure.decode(value)
    except ValueError as error:
        what = f"the rendezvous store holds {error}: some program other than the ranks of this job writes to it\n"
        return Failure(-1, what.strip(), what, consequence=False)
