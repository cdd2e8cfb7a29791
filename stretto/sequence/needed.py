"""Which keys of other ranks a rank of cp needs: those that its queries see, of their documents and within the window.

With several documents in a row, or a window, that is a part of what an all-gather brings. All of it follows from the
runs that the ranks hold, so every rank knows what each sends to each, and nobody asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stretto.sequence.tiles import Run, runs_of

Ints = NDArray[np.int64]


class Needed(NamedTuple):
    """Keys of one row that one rank sees before its own runs, in the order of the row.

    `home` [k] is the rank that holds each, `slots` [k] where it does; `runs` are those of places in these arrays.
    """

    home: Ints
    slots: Ints
    runs: tuple[Run, ...]


def needed(held: Sequence[Sequence[Run]], window: int | None = None) -> tuple[Needed, ...]:
    """What each rank needs of all ranks, itself among them. A rank's own runs are seen along the diagonal: squares."""
    length = max((run.place + run.length for runs in held for run in runs), default=0)
    home, slots, starts = (np.zeros(length, np.int64) for _ in range(3))
    for rank, runs in enumerate(held):
        for slot, place, n, start in runs:
            at = slice(place, place + n)
            home[at], slots[at], starts[at] = rank, np.arange(slot, slot + n), start
    found = []
    for runs in held:
        # Of each run the keys from the first that its first query sees up to that query.
        edges = np.zeros(length + 1, np.int64)
        for _, place, _, start in runs:
            edges[start if window is None else max(start, place - window + 1)] += 1
            edges[place] -= 1
        places = np.flatnonzero(edges.cumsum()[:-1] > 0)
        found.append(Needed(home[places], slots[places], runs_of(places, starts)))
    return tuple(found)


def crossing(every: Sequence[Needed]) -> Ints:
    """[ranks, ranks]: keys that each rank (first) sends to each other one."""
    ranks = len(every)
    pairs = np.stack([np.bincount(each.home, minlength=ranks) for each in every], 1)
    np.fill_diagonal(pairs, 0)
    return pairs
