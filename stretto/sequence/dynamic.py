"""How many ranks a document is given, in each microbatch anew: as few as hold it, side by side with others.

With one size of cp for all, short documents pay for what the longest needs: their keys go to every rank, in pieces that
are small. Here a group of ranks takes documents in rounds: each goes to a power of two of neighbouring ranks that hold
it, the long ones first, short ones fill up the ranks that have least (as in Megatron-LM's hybrid context parallelism,
2025). This plans, and says what it would be worth by a cost model; nothing executes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """Seconds of one layer of a model, forward and backward, on one rank."""

    token: float
    """All GEMMs of a token."""
    pair: float
    """Attention of one query to one key."""
    exchange: float
    """Keys and values of one token that come from another rank, and their gradients."""
    latency: float
    """Of each exchange."""


@dataclass(frozen=True)
class Placed:
    """A document on `ranks`, of a group, in a round."""

    document: int
    round: int
    ranks: range


def ranks_for(length: int, capacity: int, group: int) -> int:
    """The least power of two of ranks that hold a document. Raises ValueError where all of them do not."""
    size = 1
    while size * capacity < length:
        size *= 2
    if size > group:
        raise ValueError(f"a document of {length} tokens does not fit on {group} ranks of {capacity} tokens each")
    return size


def plan(lengths: Sequence[int], group: int, capacity: int, rates: Rates) -> list[Placed]:
    """Every document on as few ranks as hold it; a rank has at most `capacity` tokens in a round."""
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    room: list[list[int]] = []
    busy: list[list[float]] = []
    found = []
    for n in order:
        size = ranks_for(lengths[n], capacity, group)
        share = -(-lengths[n] // size)
        best: tuple[float, int, int] | None = None
        for number, left in enumerate(room):
            for first in range(0, group, size):
                if min(left[first : first + size]) >= share:
                    # Where it makes the round longest least; then where it is shortest.
                    after = max(busy[number][first : first + size]) + seconds(lengths[n], size, rates)
                    longer = max(0.0, after - max(busy[number]))
                    if best is None or (longer, number) < best[:2]:
                        best = longer, number, first
        if best is None or best[0] > seconds(lengths[n], size, rates) * 0.999:
            room.append([capacity] * group)
            busy.append([0.0] * group)
            best = 0.0, len(room) - 1, 0
        _, number, first = best
        for rank in range(first, first + size):
            room[number][rank] -= share
            busy[number][rank] += seconds(lengths[n], size, rates)
        found.append(Placed(n, number, range(first, first + size)))
    return found


def seconds(length: int, ranks: int, rates: Rates) -> float:
    """One document, dealt evenly to so many ranks."""
    pairs = length * (length + 1) / 2
    moved = length * (ranks - 1) / ranks * rates.exchange + rates.latency * (ranks > 1)
    return length / ranks * rates.token + pairs / ranks * rates.pair + moved


def makespan(lengths: Sequence[int], placed: Sequence[Placed], rates: Rates) -> float:
    """Of all rounds, one after another: each is as long as its busiest rank."""
    busy: dict[tuple[int, int], float] = {}
    for each in placed:
        for rank in each.ranks:
            key = each.round, rank
            busy[key] = busy.get(key, 0.0) + seconds(lengths[each.document], len(each.ranks), rates)
    rounds = {number for number, _ in busy}
    return sum(max(time for (number, _), time in busy.items() if number == r) for r in rounds)


def fixed(lengths: Sequence[int], group: int, rates: Rates) -> float:
    """The same documents, each on all ranks of the group."""
    return sum(seconds(length, group, rates) for length in lengths)
