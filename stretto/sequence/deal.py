"""A row of tokens dealt to the ranks of cp: as many to each, and as much attention.

The work of a query is the number of keys that it attends to: t - start + 1 at place t of a document that begins at
`start`, or the window where that is less. A row is cut into equally many blocks for each rank, which are dealt by their
work: the heaviest blocks first, a round of them at a time, each to the rank that has least. For one document and two
blocks a rank that is the zigzag (block i and block 2 cp - 1 - i on rank i; Zhu, "ring-flash-attention", 2024).

Nothing is required of lengths: ranks hold equally many slots, and the few that are too many, behind the end of the row,
are tokens that nobody sees and that see nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

EVEN: Final = 1.01
"""The heaviest load over the mean that is good enough: more blocks make smaller pieces for the kernels."""

_BLOCKS: Final = (2, 4, 8, 16, 32, 64)
"""Blocks of a rank that are tried, in order."""


def local_length(seq_len: int, ranks: int, multiple: int = 1) -> int:
    """Slots of each rank for rows of `seq_len` tokens: a multiple of tp under sequence parallelism."""
    return -(-seq_len // (ranks * multiple)) * multiple


def work(starts: Ints, windows: Sequence[int | None] = (None,)) -> Ints:
    """[s]: keys that each query of a row attends to, summed over layers with these windows."""
    before = np.arange(len(starts)) - starts + 1
    counted = {window: list(windows).count(window) for window in windows}
    return sum(
        (times * (before if window is None else np.minimum(before, window)) for window, times in counted.items()),
        np.zeros(len(starts), np.int64),
    )


def deal(amounts: Ints, ranks: int, length: int, loads: Ints) -> Ints:
    """Places [ranks, length] of a row that each rank holds, ascending; those beyond the row hold no token.

    `amounts` [s] is the work of each place. `loads` [ranks], what the ranks have already, grows by it. Raises
    ValueError where the slots of all ranks do not hold the row.
    """
    if ranks * length < len(amounts):
        raise ValueError(f"{ranks} ranks with {length} slots each do not hold a row of {len(amounts)} tokens")
    padded = np.concatenate([amounts, np.zeros(ranks * length - len(amounts), np.int64)])
    best: tuple[float, Ints, Ints] | None = None
    for blocks in _BLOCKS:
        if blocks > length > 1 and best is not None:
            break
        held, after = _dealt(padded, ranks, min(blocks, length), loads)
        uneven = float(after.max() * ranks / max(1, after.sum()))
        if best is None or uneven < best[0]:
            best = uneven, held, after
        if uneven <= EVEN:
            break
    assert best is not None
    loads[:] = best[2]
    return best[1]


def _dealt(amounts: Ints, ranks: int, blocks: int, loads: Ints) -> tuple[Ints, Ints]:
    """With so many blocks for each rank: the places, and the loads after them."""
    length = len(amounts) // ranks
    small, more = divmod(length, blocks)
    # Of each size as many blocks as ranks times: whoever deals by size gives all ranks the same number of tokens.
    sizes = np.repeat([small + 1, small], [more * ranks, (blocks - more) * ranks])
    ends = np.cumsum(sizes)
    sums = np.add.reduceat(amounts, ends - sizes)
    loads, home = loads.copy(), np.empty(len(sizes), np.int64)
    for alike in (np.arange(more * ranks), np.arange(more * ranks, len(sizes))):
        heaviest = alike[np.argsort(-sums[alike], kind="stable")]
        for first in range(0, len(heaviest), ranks):
            a_round = heaviest[first : first + ranks]
            home[a_round] = np.argsort(loads, kind="stable")
            loads[home[a_round]] += sums[a_round]
    _level(home, sums, sizes, loads)
    begins = ends - sizes
    places = [np.concatenate([np.arange(begins[i], ends[i]) for i in np.flatnonzero(home == r)]) for r in range(ranks)]
    return np.stack(places), loads


def _level(home: Ints, sums: Ints, sizes: Ints, loads: Ints) -> None:
    """Exchange blocks of one size between the heaviest rank and the lightest, while that makes them more even."""
    for _ in range(4 * len(loads)):
        high, low = int(loads.argmax()), int(loads.argmin())
        gap = int(loads[high] - loads[low])
        if loads[high] * len(loads) <= EVEN * loads.sum() or gap < 2:
            return
        ours, theirs = np.flatnonzero(home == high), np.flatnonzero(home == low)
        moved = sums[ours][:, None] - sums[theirs][None, :]
        worse = np.where(sizes[ours][:, None] == sizes[theirs][None, :], np.abs(gap - 2 * moved), gap)
        a, b = divmod(int(worse.argmin()), len(theirs))
        if worse[a, b] >= gap:
            return
        home[ours[a]], home[theirs[b]] = low, high
        loads[high] -= moved[a, b]
        loads[low] += moved[a, b]


def uneven(loads: NDArray[Any]) -> float:
    """The heaviest load over the mean of all; 1 is even."""
    return float(loads.max() * len(loads) / loads.sum()) if loads.sum() else 1.0
