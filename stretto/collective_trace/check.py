"""`Checker`: the ranks compare each communication before they issue it, and say who differs in place of hanging.

The comparison goes through the rendezvous store, so it works however stuck the communicators are. It makes every
communication a meeting of its ranks, asynchronous ones and sends too: right programs stay right, because all ranks
follow one global order that needs no buffering, but overlap is gone. It is for finding a fault, not for training.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from traceback import walk_tb
from typing import NoReturn

from torch import Tensor
from torch.distributed import DistError, Store  # type: ignore[attr-defined]

from stretto.collective_trace.alive import me, state
from stretto.collective_trace.call import CollectiveCall, caller, decode, encode, passes_on, site
from stretto.collective_trace.compare import odd
from stretto.collective_trace.record import Recorder
from stretto.collective_trace.table import table
from stretto.store import LostError, TimedStore
from stretto.world import World

CHECK_SECONDS = 60.0
"""How long ranks wait for each other before each communication."""

FIRST_PAUSE, LOOK_SECONDS = 5e-5, 0.2
"""A rank that waits looks again after so long, which doubles each time; and now and then whether others have failed."""


class CollectiveError(Exception):
    """The ranks do not communicate alike; the message is a table of what each was about to do.

    Raised on the one rank that found it. Not a RuntimeError, so that its text, which may have any path of the user's
    in it, is never taken for a message of a communication back end. `silent` are ranks that may be dead or
    cut off, as far as can be seen from here: whether they answer is to be asked.
    """

    def __init__(self, text: str, silent: tuple[int, ...] = ()) -> None:
        super().__init__(text)
        self.silent = silent


class PeerStoppedError(RuntimeError):
    """Another rank has found that the ranks do not communicate alike, or has failed; it says how."""


class Checker(Recorder):
    """A recorder that lets no communication begin before all its ranks are known to be there for the same one.

    `timeout` is in seconds: a rank that has not come by then is named, with the last thing that it did.
    """

    def __init__(self, timeout: float = CHECK_SECONDS) -> None:
        super().__init__(keep=1)
        self.timeout = timeout
        self._failed = False

    def attach(self, world: World, store: Store) -> None:
        """Remember where the ranks meet."""
        self._world, self._store = world, TimedStore(store)
        self._store.set(f"process/{world.rank}", me())

    def record(self, axis: str, channel: str, ranks: tuple[int, ...], op: str, x: Tensor) -> None:
        """Record, and wait for the others of `ranks`, for at most `timeout` seconds.

        Raises CollectiveError on the rank that finds a difference, PeerStoppedError on all others of the world.
        """
        super().record(axis, channel, ranks, op, x)
        self._meet(self.calls[-1])

    def close(self) -> None:
        """Wait until all ranks have come to the end of the run; whoever does something else instead is named."""
        for channel, (axis, ranks) in self.groups.items():
            number = self._numbers.get(channel, 0)
            self._meet(CollectiveCall(axis, channel, ranks, number, "end of the run", (), "", 0, site(*caller())))

    def failed(self, error: BaseException) -> None:
        """Tell the other ranks, who would wait; `error` gets a note with what each rank was doing."""
        if self._failed or not isinstance(error, Exception):
            return
        where = f" at {place}" if (place := _raised_at(error)) else ""
        try:
            if self._claim():
                what = f"rank {self._world.rank} raised {type(error).__name__}{where}, while the others were last seen"
                error.add_note(self._world_table(what, {self._world.rank: "raised"}))
        except (DistError, LostError):
            return  # the store went first: there is nobody to tell

    def _meet(self, call: CollectiveCall) -> None:
        store, place = self._store, call.ranks.index(self._world.rank)
        key = f"{call.channel}/{call.number}"
        said = encode([call])
        store.set(f"last/{self._world.rank}", said)
        store.set(f"{key}/{place}", said)
        if store.add(f"{key}/arrived", 1) == len(call.ranks):
            self._compare(call, key)
        else:
            self._wait(call, key)

    def _compare(self, call: CollectiveCall, key: str) -> None:
        """All are here, and this rank came last: let them go on, or fail."""
        said = self._store.multi_get([f"{key}/{place}" for place in range(len(call.ranks))])
        calls = {rank: decode(text)[0] for rank, text in zip(call.ranks, said, strict=True)}
        if len({each.signature for each in calls.values()}) > 1:
            self._fail(f"the ranks of {call.channel} differ in call {call.number}", calls, odd(calls))
        self._store.set(f"{key}/go", "")
        if call.number > 0:  # all have left the meeting before: nobody reads it any more
            old = f"{call.channel}/{call.number - 1}"
            for name in ("arrived", "go", *map(str, range(len(call.ranks)))):
                self._store.delete_key(f"{old}/{name}")

    def _wait(self, call: CollectiveCall, key: str) -> None:
        begun = time.monotonic()
        pause, look = FIRST_PAUSE, begun + LOOK_SECONDS
        # Not by waiting in the store: it logs each time that it waited in vain.
        while not self._store.check([f"{key}/go"]):
            now = time.monotonic()
            if now > look:
                look = now + LOOK_SECONDS
                if self._store.check(["failed"]):
                    self._stop()
                if any(self._state(rank) == "dead" for rank in self._missing(call, key)):
                    self._absent(call, key, "can never be joined by all")
            if now > begun + self.timeout:
                self._absent(call, key, f"was not joined by all within {self.timeout:g} s")
            time.sleep(pause)
            pause = min(2 * pause, LOOK_SECONDS / 4)

    def _absent(self, call: CollectiveCall, key: str, what: str) -> NoReturn:
        """Some rank did not come: say who, and what it did last.

        A rank that waits for another in a meeting of its own keeps us waiting, but is not the cause: those that it
        waits for are looked at in its place, and so on. Where all wait in a circle, all of them are shown.
        """
        missing = self._missing(call, key)
        cause, seen, ahead = [], set(call.ranks) - set(missing), list(missing)
        last: dict[int, CollectiveCall | None] = {}
        while ahead:
            rank = ahead.pop()
            if rank in seen:
                continue
            seen.add(rank)
            its = last[rank] = self._last(rank)
            behind = self._waits_for(its)
            ahead += behind
            if not behind:
                cause.append(rank)
        calls = {
            rank: self._last(rank) if rank in missing else decode(self._store.get(f"{key}/{place}"))[0]
            for place, rank in enumerate(call.ranks)
        }
        states = {rank: self._state(rank) for rank in cause or missing}
        notes = {rank: f"{(how or 'missing').upper()} since its last call" for rank, how in states.items()}
        unseen = tuple(rank for rank, how in states.items() if not how)  # busy, or on a host that is not reached
        notes |= {rank: "waits for others" for rank in last if rank not in notes}
        self._fail(f"call {call.number} of {call.channel} {what}", {**last, **calls}, notes, unseen)

    def _waits_for(self, call: CollectiveCall | None) -> list[int]:
        """Who has not come to the meeting in which a rank is; nobody, if it has left it."""
        key = "" if call is None else f"{call.channel}/{call.number}"
        if call is None or self._store.check([f"{key}/go"]):
            return []
        return self._missing(call, key)

    def _missing(self, call: CollectiveCall, key: str) -> list[int]:
        return [rank for place, rank in enumerate(call.ranks) if not self._store.check([f"{key}/{place}"])]

    def _state(self, rank: int) -> str:
        return state(self._store.get(f"process/{rank}").decode())

    def _last(self, rank: int) -> CollectiveCall | None:
        key = f"last/{rank}"
        return decode(self._store.get(key))[0] if self._store.check([key]) else None

    def _fail(
        self,
        what: str,
        calls: Mapping[int, CollectiveCall | None],
        notes: Mapping[int, str],
        silent: tuple[int, ...] = (),
    ) -> NoReturn:
        """Raise with the table, unless another rank was first to find something."""
        if not self._claim():
            self._stop()
        others = {rank: self._last(rank) for rank in range(self._world.size) if rank not in calls}
        raise CollectiveError(table(what, calls, notes, others), silent)

    def _world_table(self, what: str, notes: dict[int, str]) -> str:
        return table(what, {rank: self._last(rank) for rank in range(self._world.size)}, notes, {})

    def _claim(self) -> bool:
        """Whether this rank is the first to find a failure; from then on all others stop."""
        self._failed = True
        return self._store.compare_set("failed", "", str(self._world.rank)) == str(self._world.rank).encode()

    def _stop(self) -> NoReturn:
        self._failed = True
        rank = self._store.get("failed").decode()
        raise PeerStoppedError(f"rank {rank} has stopped this run, and says why")


def _raised_at(error: Exception) -> str:
    """FILE:LINE of the innermost frame that does not just pass a communication on."""
    frames = [(frame, line) for frame, line in walk_tb(error.__traceback__) if not passes_on(frame)]
    return f"{frames[-1][0].f_code.co_filename}:{frames[-1][1]}" if frames else ""
