"""`LastCalls`: the newest calls of each rank, compared when a run has already lost a peer or hung for too long."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from torch.distributed import DistError, Store  # type: ignore[attr-defined]

from stretto.traffic.call import Call, decode, encode
from stretto.traffic.check import CollectiveError
from stretto.traffic.compare import divergences, odd
from stretto.traffic.record import Recorder
from stretto.traffic.table import table
from stretto.world import World

KEPT = 64
"""Calls that each rank remembers."""

GATHER_SECONDS = 1.5
"""How long the first rank that fails waits for the others to fail too, and to say what they did."""


class LastCalls(Recorder):
    """A recorder whose cost, a few microseconds for a call, every run can bear.

    `lost` tells whether an exception says that a peer is gone or does not answer: a failure of another kind speaks
    for itself. Where the back end ends the process in place of raising, as NCCL's watchdog does, nothing is told.
    """

    def __init__(self, lost: Callable[[BaseException], bool]) -> None:
        super().__init__(keep=KEPT)
        self._lost = lost

    def attach(self, world: World, store: Store) -> None:
        """Remember where the ranks meet."""
        self._world, self._store = world, store

    def close(self) -> None:
        """Leave this rank's last calls for others, who may fail because it lacks one."""
        self._publish()

    def failed(self, error: BaseException) -> None:
        """Leave this rank's last calls, before its end lets others fail."""
        if self._lost(error):
            self._publish()

    def left(self, error: BaseException) -> None:
        """On the first rank that lost a peer: raise CollectiveError with the last calls of all."""
        if not self._lost(error):
            return
        me = str(self._world.rank)
        try:
            if self._store.compare_set("failed", "", me) != me.encode():
                return
            records = self._gather()
        except DistError:
            return  # the store went first: there is nobody to tell
        raise CollectiveError(f"{error}\n{_account(records, self._world.size)}") from error

    def _publish(self) -> None:
        with suppress(DistError):
            self._store.set(f"calls/{self._world.rank}", encode(self.calls))

    def _gather(self) -> dict[int, list[Call]]:
        ranks = range(self._world.size)
        deadline = time.monotonic() + GATHER_SECONDS
        while not self._store.check([f"calls/{rank}" for rank in ranks]) and time.monotonic() < deadline:
            time.sleep(0.05)
        here = [rank for rank in ranks if self._store.check([f"calls/{rank}"])]
        return {rank: decode(self._store.get(f"calls/{rank}")) for rank in here}


def _account(records: Mapping[int, Sequence[Call]], size: int) -> str:
    """Where the ranks that answered part ways, or else what each did last."""
    silent = dict.fromkeys((r for r in range(size) if r not in records), "NO ANSWER: stopped, dead, or busy elsewhere")
    lines = [
        table(
            f"the ranks of {each.channel} differ in call {each.number}",
            {**dict.fromkeys(silent), **each.calls},
            {**odd(each.calls), **silent},
            {},
        )
        for each in divergences(records)
    ]
    last = {rank: records[rank][-1] if records.get(rank) else None for rank in range(size)}
    return "\n".join(lines) or table("the last call of each rank", last, silent, {})
