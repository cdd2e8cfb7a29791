"""Who is still there? Each rank's watching thread answers; a process that is stopped, dead or cut off does not."""

from __future__ import annotations

import json
from dataclasses import dataclass

from stretto.collective_trace.alive import me, state
from stretto.layout.ranks import ranges
from stretto.store import TimedStore, absent, combine, read_json

ANSWER_SECONDS = 5.0
"""How long a rank may take to answer. Its main thread need not: any part of it that runs will do."""


@dataclass(frozen=True)
class Silent:
    """Ranks that do not answer, and how their processes are where that can be seen from here."""

    ranks: tuple[int, ...]
    processes: tuple[str, ...]
    """HOST/PID of each; empty where it never said."""

    def __str__(self) -> str:
        """In a sentence, by host: "rank 2 does not answer: its process (pid 77 on n1) is stopped"."""
        if len(self.ranks) == 1:
            host, _, pid = self.processes[0].rpartition("/")
            how = {"stopped": "is stopped", "dead": "is dead"}.get(state(self.processes[0]), "")
            where = f"its process (pid {pid} on {host})" if pid else "its process"
            why = f"{where} {how or 'is stopped or dead, or its host is not reached'}"
            return f"rank {self.ranks[0]} does not answer: {why}"
        hosts: dict[str, list[int]] = {}
        for rank, process in zip(self.ranks, self.processes, strict=True):
            hosts.setdefault(process.rpartition("/")[0] or "an unknown host", []).append(rank)
        where = "; ".join(f"on {host}: {ranges(ranks)}" for host, ranks in list(hosts.items())[:16])
        more = f"; and on {len(hosts) - 16} hosts more" if len(hosts) > 16 else ""
        return f"{len(self.ranks)} ranks do not answer ({where}{more}): they are stopped or dead, or not reached"


@dataclass(frozen=True)
class Server:
    """The process that serves the store: rank 0's, or its launcher's where `pid` is 0."""

    host: str = ""
    pid: int = 0

    def __str__(self) -> str:
        """Where the store is: "host n1, with rank 0 (pid 77)"."""
        where = f"host {self.host}" if self.host else "an unknown host"
        return f"{where}, with rank 0 (pid {self.pid})" if self.pid else f"{where}, with the launcher of rank 0"

    def silent_to(self, rank: int) -> str:
        """That it does not answer, and why where that can be seen from here."""
        how = {"stopped": "is stopped", "dead": "is dead"}.get(state(f"{self.host}/{self.pid}"), "") if self.pid else ""
        if how:
            return f"rank 0 does not answer: its process (pid {self.pid} on {self.host}) {how}"
        why = "that host is not reached, or its process is stopped or dead"
        return f"the rendezvous store, on {self}, does not answer rank {rank}: {why}"


def introduce(store: TimedStore, rank: int) -> None:
    """Say which process this rank is."""
    store.set(f"process/{rank}", me())


def call_roll(store: TimedStore, size: int) -> Silent | None:
    """Have the watching threads of all ranks answer; who does not."""
    number = store.add("rolls", 1)
    publish(store, event("roll", number))
    return silent(store, number, size)


def publish(store: TimedStore, value: str) -> None:
    """The next event, for all ranks."""
    store.set(f"event/{store.add('events', 1) - 1}", value)


def answer(store: TimedStore, number: int, rank: int, size: int) -> None:
    """Answer the roll call of a number."""
    call = store.under(f"roll/{number}")
    if combine(call, rank, size, "") is not None:
        call.set("all", "")


def silent(store: TimedStore, number: int, size: int) -> Silent | None:
    """Who has not answered a roll call, `ANSWER_SECONDS` after it was called; None when all have.

    Ranks that have left in good order are not missed.
    """
    call = store.under(f"roll/{number}")
    if call.poll("all", ANSWER_SECONDS):
        return None
    ranks = [rank for rank in absent(call, size) if not store.check([f"left/{rank}"])]
    return Silent(tuple(ranks), tuple(_process(store, rank) for rank in ranks)) if ranks else None


def leave(store: TimedStore, rank: int) -> None:
    """Be missed by nobody from now on."""
    store.set(f"left/{rank}", "")


def _process(store: TimedStore, rank: int) -> str:
    return store.get(f"process/{rank}").decode(errors="replace") if store.check([f"process/{rank}"]) else ""


def event(kind: str, number: int) -> str:
    """What the watching threads hear of a roll call, or of the end."""
    return json.dumps({"event": kind, "number": number})


def heard(value: bytes) -> tuple[str, int] | None:
    """The kind and number of such an event; None for what is none."""
    said = read_json(value)
    if isinstance(said, dict) and isinstance(said.get("event"), str) and isinstance(said.get("number"), int):
        return said["event"], said["number"]
    return None
