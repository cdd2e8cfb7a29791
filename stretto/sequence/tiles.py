"""Which of the tokens that are held here see which of those held there, as few rectangles with a diagonal each.

A rank's slots of a row hold runs: stretches of one document that lie side by side in it. A run of queries and a run of
keys of the same document make a tile. All that attention needs to know of a mask is in it, so that no mask exists, no
kernel sees a key of another document, and the work of a rank is what its tiles count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


Which = Literal["all", "square", "before"]
"""Which tiles of a run of queries: with keys of the same tokens, with keys before these, or both as one."""


class Run(NamedTuple):
    """`length` tokens from `slot` on, which are those from `place` on in the row; their document begins at `start`."""

    slot: int
    place: int
    length: int
    start: int


class Tile(NamedTuple):
    """Slots of queries and of keys. Query i of it attends to key j where i + offset - window < j <= i + offset."""

    query: slice
    key: slice
    offset: int
    window: int | None

    @property
    def shape(self) -> tuple[int, int]:
        """Queries and keys."""
        return self.query.stop - self.query.start, self.key.stop - self.key.start

    @property
    def whole(self) -> bool:
        """Whether each of its queries attends to each of its keys."""
        n, m = self.shape
        return self.offset >= m - 1 and (self.window is None or n - 1 + self.offset < self.window)


def runs_of(places: Ints, starts: Ints) -> tuple[Run, ...]:
    """The runs of slots that hold `places` [n] of a row whose documents begin at `starts` [s]; beyond it is nothing."""
    slots = np.flatnonzero(places < len(starts))
    if not len(slots):
        return ()
    held = places[slots]
    begins = starts[held]
    breaks = np.flatnonzero((np.diff(held) != 1) | (np.diff(begins) != 0) | (np.diff(slots) != 1)) + 1
    firsts = np.concatenate([[0], breaks])
    lengths = np.diff(np.concatenate([firsts, [len(slots)]]))
    columns = (slots[firsts], held[firsts], lengths, begins[firsts])
    return tuple(Run(*each) for each in zip(*(column.tolist() for column in columns), strict=True))


def arranged(held: Sequence[Sequence[Run]], length: int) -> tuple[Ints, tuple[Run, ...]]:
    """Several ranks' slots, `length` of each one after another, put into the order of the row.

    Which slot comes where [ranks * length], and the runs then: fewer and longer ones.
    """
    every = sorted((run.place, rank * length + run.slot, run) for rank, runs in enumerate(held) for run in runs)
    order = [np.arange(slot, slot + run.length) for _, slot, run in every]
    taken = np.concatenate(order) if order else np.empty(0, np.int64)
    rest = np.setdiff1d(np.arange(len(held) * length), taken)
    found: list[Run] = []
    slot = 0
    for _, _, run in every:
        last = found[-1] if found else None
        if last is not None and last.start == run.start and last.place + last.length == run.place:
            found[-1] = last._replace(length=last.length + run.length)
        else:
            found.append(run._replace(slot=slot))
        slot += run.length
    return np.concatenate([taken, rest]).astype(np.int64), tuple(found)


def squares(runs: Sequence[Run], window: int | None = None) -> Iterator[Tile]:
    """The tiles in which queries and keys are the same runs."""
    for run in runs:
        at = slice(run.slot, run.slot + run.length)
        yield Tile(at, at, 0, window)


def tiles(
    queries: Sequence[Run], keys: Sequence[Run], window: int | None = None, *, before: bool = False
) -> Iterator[Tile]:
    """The tiles in which any query sees any key; with `before` keys before the first query of its run alone."""
    by_start: dict[int, list[Run]] = {}
    for key in keys:
        by_start.setdefault(key.start, []).append(key)
    for query in queries:
        for key in by_start.get(query.start, ()):
            first = key.place if window is None else max(key.place, query.place - window + 1)
            end = min(key.place + key.length, query.place + (0 if before else query.length))
            # Queries before all the keys see none, nor do those whose window has passed them.
            skip = max(0, first - query.place)
            stop = query.length if window is None else min(query.length, end - 1 + window - query.place)
            if first < end and skip < stop:
                q, k = query.slot - query.place, key.slot - key.place
                begin = query.place + skip
                at = slice(q + begin, q + query.place + stop), slice(k + first, k + end)
                yield Tile(*at, begin - first, window)


def pairs(tile: Tile) -> int:
    """How many pairs of a query and a key that it sees are in a tile: its work."""
    n, m = tile.shape
    last = np.minimum(np.arange(n) + tile.offset, m - 1)
    first = np.zeros(n, np.int64) if tile.window is None else np.arange(n) + tile.offset - tile.window + 1
    return int(np.maximum(last - np.maximum(first, 0) + 1, 0).sum())
