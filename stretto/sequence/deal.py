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
    """[kinds, s]: keys that each query of a row attends to, in layers of each of these windows; [s] if that is one.

    Layers wait for each other's ranks one by one, so each kind of them is to be even, not their sum.
    """
    before = np.arange(len(starts)) - starts + 1
    kinds = [before if window is None else np.minimum(before, window) for window in dict.fromkeys(windows)]
    return kinds[0] if len(kinds) == 1 else np.stack(kinds)


def deal(amounts: Ints, ranks: int, length: int, loads: Ints) -> Ints:
    """Places [ranks, length] of a row that each rank holds, ascending; those beyond the row hold no token.

    `amounts` [s] or [kinds, s] is the work of each place. `loads` [ranks] or [kinds, ranks], what the ranks have
    already, grows by it. Raises ValueError where the slots of all ranks do not hold the row.
    """
    amounts, all_loads = np.atleast_2d(amounts), np.atleast_2d(loads)
    kinds, tokens = amounts.shape
    if ranks * length < tokens:
        raise ValueError(f"{ranks} ranks with {length} slots each do not hold a row of {tokens} tokens")
    padded = np.concatenate([amounts, np.zeros((kinds, ranks * length - tokens), np.int64)], 1)
    best: tuple[float, Ints, Ints] | None = None
    for blocks in _BLOCKS:
        if blocks > length > 1 and best is not None:
            break
        held, after = _dealt(padded, ranks, min(blocks, length), all_loads)
        most = uneven(after)
        if best is None or most < best[0]:
            best = most, held, after
        if most <= EVEN:
            break
    assert best is not None
    all_loads[:] = best[2]
    return best[1]


def _dealt(amounts: Ints, ranks: int, blocks: int, loads: Ints) -> tuple[Ints, Ints]:
    """With so many blocks for each rank: the places, and the loads after them."""
    length = amounts.shape[1] // ranks
    small, more = divmod(length, blocks)
    # Of each size as many blocks as ranks times: whoever deals by size gives all ranks the same number of tokens.
    sizes = np.repeat([small + 1, small], [more * ranks, (blocks - more) * ranks])
    ends = np.cumsum(sizes)
    sums = np.add.reduceat(amounts, ends - sizes, axis=1)
    loads, home = loads.copy(), np.empty(len(sizes), np.int64)
    # In parts of what a rank has of each kind in the end, which are added up where kinds are many.
    share = ranks / np.maximum(1, loads.sum(1) + sums.sum(1))
    weights = share @ sums
    for alike in (np.arange(more * ranks), np.arange(more * ranks, len(sizes))):
        heaviest = alike[np.argsort(-weights[alike], kind="stable")]
        for first in range(0, len(heaviest), ranks):
            a_round = heaviest[first : first + ranks]
            home[a_round] = np.argsort(share @ loads, kind="stable")
            loads[:, home[a_round]] += sums[:, a_round]
    _level(home, sums, sizes, loads, share[:, None])
    begins = ends - sizes
    places = [np.concatenate([np.arange(begins[i], ends[i]) for i in np.flatnonzero(home == r)]) for r in range(ranks)]
    return np.stack(places), loads


def _level(home: Ints, sums: Ints, sizes: Ints, loads: Ints, share: NDArray[np.float64]) -> None:
    """Exchange blocks of one size between the heaviest rank and one of the lightest, while that makes them more even.

    The heaviest is that of any kind of work; no kind of the two may then be as heavy.
    """
    ranks, kinds = loads.shape[1], len(loads)
    for _ in range(4 * ranks * kinds):
        parts = loads * share
        kind, high = np.unravel_index(parts.argmax(), parts.shape)
        if parts[kind, high] <= EVEN:
            return
        ours = np.flatnonzero(home == high)
        for low in np.argsort(parts[kind], kind="stable")[: 4 if kinds > 1 else 1]:
            theirs = np.flatnonzero(home == low)
            moved = (sums[:, ours][:, :, None] - sums[:, theirs][:, None, :]) * share[:, :, None]
            of_both = np.maximum(parts[:, high, None, None] - moved, parts[:, low, None, None] + moved).max(0)
            after = np.where(sizes[ours][:, None] == sizes[theirs][None, :], of_both, np.inf)
            a, b = divmod(int(after.argmin()), len(theirs))
            if after[a, b] < parts[kind, high] * (1 - 1e-9):
                break
        else:
            return
        home[ours[a]], home[theirs[b]] = low, high
        change = sums[:, ours[a]] - sums[:, theirs[b]]
        loads[:, high] -= change
        loads[:, low] += change


def uneven(loads: NDArray[Any]) -> float:
    """The heaviest load over the mean of all, of the kind [kinds, ranks] where that is most; 1 is even."""
    found = np.atleast_2d(loads)
    return float((found.max(1) * found.shape[1] / np.maximum(1, found.sum(1))).max()) if found.any() else 1.0
