"""When one rank fails, all end soon, and each shows that rank's traceback last, whatever launched them.

The failing rank leaves its traceback in the store. A rank whose collective then breaks reads it there and raises it
in place of "connection closed". A rank that is stuck in a collective that does not break (NCCL waits for its
time-out) is ended by a thread that looks into the store now and then.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from stretto.initialize.failures import Failure, PeerFailedError, is_consequence

LOOK_SECONDS = 1.0
"""How often each rank looks for another's failure: one small request to the store."""

LEAVE_SECONDS = 5.0
"""How long a rank may take to leave by itself once another has failed; P15 allows 15 s for everything."""

LEARN_SECONDS = 2.0
"""How long a rank that lost a peer waits to hear why."""

KEY, HEARD = "failure", "failure/heard"


@contextmanager
def failing_together(store: Store, rank: int, size: int) -> Iterator[None]:
    """Within, this rank's exceptions end the others, and theirs end this one.

    Raises `PeerFailedError` in place of an exception that only says that a peer is gone, when it is known why.
    """
    left = Event()
    looking = store.clone()  # type: ignore[attr-defined]  # a connection of its own: nobody's long wait blocks it
    Thread(target=_watch, args=(looking, left), name="stretto-watch", daemon=True).start()
    try:
        yield
    except Exception as error:
        cause = _learn(store) if is_consequence(error) else None
        if cause is not None:
            raise PeerFailedError(cause) from None
        _tell(store, rank, size, error)
        raise
    finally:
        left.set()


def _tell(store: Store, rank: int, size: int, error: Exception) -> None:
    """Leave the failure for the others, and give them time to read it: our end may end the store."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        ErrorHandler().record_exception(error)  # torchrun then shows it last, as its root cause
    with suppress(DistError):
        store.compare_set(KEY, "", Failure.of(rank, error).encode().decode())
        heard = store.add(HEARD, 1)  # ranks that all fail alike need not wait for each other
        deadline = time.monotonic() + LEARN_SECONDS
        while heard < size and time.monotonic() < deadline:
            time.sleep(0.05)
            heard = store.add(HEARD, 0)


def _learn(store: Store) -> Failure | None:
    """The failure that another rank has left, or soon leaves."""
    deadline = time.monotonic() + LEARN_SECONDS
    with suppress(DistError):
        while not store.check([KEY]):
            if time.monotonic() > deadline:
                return None
            time.sleep(0.05)
        return _read(store)
    return None


def _read(store: Store) -> Failure:
    try:
        failure = Failure.decode(store.get(KEY))
    except ValueError as error:  # not from a rank of ours: end all the same, since none could leave its own there
        what = f"the rendezvous store holds {error}: some program other than the ranks of this job writes to it\n"
        failure = Failure(-1, what.strip(), what, consequence=False)
    store.add(HEARD, 1)
    return failure


def _watch(store: Store, left: Event) -> None:
    while not left.wait(LOOK_SECONDS):
        try:
            if not store.check([KEY]) or left.is_set():
                continue
            failure = _read(store)
        except DistError:
            return  # the store ended with rank 0: that broke what this rank waits for, or its launcher ends it
        if not left.wait(LEAVE_SECONDS):
            sys.stderr.write(f"\n{PeerFailedError(failure)}")
            sys.stderr.flush()
            os._exit(1)
