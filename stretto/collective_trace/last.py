"""`LastCalls`: the newest calls of each rank, compared when a run has already lost a peer or hung for too long."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from torch.distributed import DistError, Store  # type: ignore[attr-defined]

from stretto.collective_trace.call import CollectiveCall
from stretto.collective_trace.check import CollectiveError
from stretto.collective_trace.compare import divergences, odd
from stretto.collective_trace.record import Recorder
from stretto.collective_trace.table import table
from stretto.layout.ranks import named
from stretto.store import LostError, TimedStore, absent, combine, read_json
from stretto.world import World

KEPT = 32
"""Calls that each rank remembers."""

KEPT_AT_END = 8
"""Calls that a rank leaves behind at the end of a run, for others that then hang: every rank does, each time."""

GATHER_SECONDS = 1.5
"""How long the first rank that fails waits for the others to fail too, and to say what they did."""

AT_ONCE = 512
"""Records that are read in one request: each has its own deadline, however many ranks there are."""

Record = tuple[list[str], list[CollectiveCall]]
"""The groups that a rank is in, and its newest calls."""


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
        self._world, self._store = world, TimedStore.over(store)

    def close(self) -> None:
        """Leave this rank's last calls for others, who may fail because it lacks one."""
        self._publish(KEPT_AT_END)

    def failed(self, error: BaseException) -> None:
        """Leave this rank's last calls, before its end lets others fail."""
        if self._lost(error):
            self._publish(KEPT)

    def left(self, error: BaseException) -> None:
        """On the first rank that lost a peer: raise CollectiveError with the last calls of all."""
        if not self._lost(error):
            return
        me = str(self._world.rank)
        try:
            if self._store.compare_set("failed", "", me) != me.encode():
                return
            records = self._gather()
        except (DistError, LostError):
            return  # the store went first: there is nobody to tell
        silent = tuple(rank for rank in range(self._world.size) if rank not in records)
        told = f"{error}\n{_account(records, self._world.size)}"
        if silent:
            told += f"\n{named(silent)} did not come, and said nothing: stuck outside of communication, or gone"
        raise CollectiveError(told, silent) from error

    def _publish(self, kept: int) -> None:
        with suppress(DistError, LostError):
            self._store.set(f"calls/{self._world.rank}", pack(list(self.groups), self.calls[-kept:]))
            if combine(self._store.under("told"), self._world.rank, self._world.size, "") is not None:
                self._store.set("told/all", "")

    def _gather(self) -> dict[int, Record]:
        ranks, store = range(self._world.size), self._store
        silent = [] if store.poll("told/all", GATHER_SECONDS) else absent(store.under("told"), self._world.size)
        here = sorted(set(ranks) - set(silent))
        parts = [here[n : n + AT_ONCE] for n in range(0, len(here), AT_ONCE)]
        said = [text for part in parts for text in store.multi_get([f"calls/{rank}" for rank in part])]
        return {rank: unpack(text) for rank, text in zip(here, said, strict=True)}


def pack(groups: Sequence[str], calls: Sequence[CollectiveCall]) -> str:
    """A rank's record, as text for a store: its size does not grow with the groups' sizes, as no list of ranks is in
    it but for the two of a message. The names of its groups tell who is in which."""
    sites = list(dict.fromkeys(call.site for call in calls))
    rows = [
        [c.axis, c.channel, c.ranks if len(c.ranks) <= 2 else [], c.number, c.op, c.shape, c.dtype, c.bytes]
        for c in calls
    ]
    return json.dumps([list(groups), sites, [[*row, sites.index(c.site)] for row, c in zip(rows, calls, strict=True)]])


def unpack(text: bytes) -> Record:
    """Such a record; ranks of groups larger than two are left empty. One that cannot be read is of no calls."""
    try:
        groups, sites, rows = read_json(text)
        calls = [
            CollectiveCall(
                str(axis), str(channel), tuple(ranks), int(n), str(op), tuple(shape), str(dtype), int(size), sites[s]
            )
            for axis, channel, ranks, n, op, shape, dtype, size, s in rows
        ]
    except (ValueError, TypeError, IndexError):
        return [], []
    return [str(group) for group in groups], calls


def _with_ranks(records: Mapping[int, Record]) -> dict[int, list[CollectiveCall]]:
    """The calls, each with the ranks of its group that have a record."""
    members: dict[str, list[int]] = {}
    for rank, (groups, _) in sorted(records.items()):
        for group in groups:
            members.setdefault(group, []).append(rank)
    whole = {group: tuple(ranks) for group, ranks in members.items()}
    return {
        rank: [call if call.ranks else replace(call, ranks=whole.get(call.channel, (rank,))) for call in calls]
        for rank, (_, calls) in records.items()
    }


def _account(found: Mapping[int, Record], size: int) -> str:
    """Where the ranks that answered part ways, or else what each did last."""
    records = _with_ranks(found)
    silent = dict.fromkeys((r for r in range(size) if r not in records), "unknown: it said nothing")
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
