"""Records of several ranks, held against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stretto.collective_trace.call import CollectiveCall
from stretto.collective_trace.table import table


@dataclass(frozen=True)
class Divergence:
    """The first call of a channel in which its ranks differ; None for a rank that made none."""

    channel: str
    number: int
    calls: Mapping[int, CollectiveCall | None]

    def __str__(self) -> str:
        return table(f"the ranks of {self.channel} differ in call {self.number}", self.calls, odd(self.calls), {})


def divergences(records: Mapping[int, Sequence[CollectiveCall]]) -> tuple[Divergence, ...]:
    """Where ranks part ways: for each channel its first differing call, among the ranks that have a record.

    Records may begin at different calls, as those that keep the newest only do: what comes before is not compared.
    """
    channels: dict[str, dict[int, dict[int, CollectiveCall]]] = {}  # by channel, number, rank
    members: dict[str, tuple[int, ...]] = {}
    for rank, calls in records.items():
        for call in calls:
            members[call.channel] = call.ranks
            channels.setdefault(call.channel, {}).setdefault(call.number, {})[rank] = call
    found = []
    for channel, numbers in channels.items():
        oldest = [min(n for n, calls in numbers.items() if rank in calls) for rank in _seen(numbers)]
        for number in (n for n in sorted(numbers) if n >= max(oldest)):
            each = {rank: numbers[number].get(rank) for rank in members[channel] if rank in records}
            if len({call and call.signature for call in each.values()}) > 1:
                found.append(Divergence(channel, number, each))
                break
    return tuple(found)


def _seen(numbers: Mapping[int, Mapping[int, CollectiveCall]]) -> set[int]:
    """The ranks with any call of a channel."""
    return {rank for calls in numbers.values() for rank in calls}


def odd(calls: Mapping[int, CollectiveCall | None]) -> dict[int, str]:
    """A note for each rank that does not do what most do; for all of them if there is no majority."""
    ranks: dict[object, list[int]] = {}
    for rank, call in calls.items():
        ranks.setdefault(call and call.signature, []).append(rank)
    most = max(map(len, ranks.values()))
    common = [signature for signature, who in ranks.items() if len(who) == most]
    return {
        rank: "MISSING" if call is None else "DIFFERS"
        for rank, call in calls.items()
        if len(common) > 1 or (call and call.signature) != common[0]
    }


@dataclass(frozen=True)
class Volume:
    """What a rank sends over an axis by one operation: how many calls, and at least so many bytes."""

    calls: int = 0
    bytes: float = 0.0


def volumes(calls: Sequence[CollectiveCall]) -> dict[tuple[str, str], Volume]:
    """What one rank's calls send, by axis and operation; a receive is the sender's."""
    found: dict[tuple[str, str], Volume] = {}
    for call in calls:
        if call.op != "recv":
            key = call.axis, call.op
            before = found.get(key, Volume())
            found[key] = Volume(before.calls + 1, before.bytes + call.wire_bytes)
    return found
