"""Documents put into rows whole, by best fit (Ding et al., "Fewer truncations improve language modeling", 2024).

A document that is longer than a row is cut into rows, and what is left of it is one more piece; each piece, the longest
first, goes into the row that it leaves least room in. A row's documents do not see each other.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Piece(NamedTuple):
    """`length` tokens from `first` on that are predicted one from another."""

    first: int
    length: int


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of pieces, as arrays: row n has those from `begins[n]` to `begins[n + 1]` of `firsts` and `lengths`."""

    begins: Ints
    firsts: Ints
    lengths: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.begins) - 1

    def __getitem__(self, number: int) -> tuple[Piece, ...]:
        at = slice(*self.begins[number : number + 2].tolist())
        return tuple(map(Piece, self.firsts[at].tolist(), self.lengths[at].tolist()))

    def __iter__(self) -> Iterator[tuple[Piece, ...]]:
        return map(self.__getitem__, range(len(self)))


def pack(lengths: Ints, firsts: Ints, row: int) -> Rows:
    """Rows of at most `row` tokens of documents that begin at `firsts`; the same for the same lengths.

    Pieces of one length go into rows of one room together, so that time grows with how many lengths there are, not with
    documents. Raises ValueError for a row without room.
    """
    if row < 1:
        raise ValueError(f"rows of {row} tokens hold nothing")
    whole, rest = np.divmod(lengths, row)
    of = np.repeat(np.arange(len(lengths)), whole)
    # The n-th row that a document fills, counted in each document anew.
    nth = np.arange(len(of)) - np.repeat(np.cumsum(whole) - whole, whole)
    left = np.flatnonzero(rest)
    left = left[np.argsort(-rest[left], kind="stable")]  # the longest first, of one length in order
    sizes, counts = np.unique(-rest[left], return_counts=True)
    numbers, rows = _best_fit((-sizes).tolist(), counts.tolist(), row)
    number = np.concatenate([np.arange(len(of)), *(each + len(of) for each in numbers)])
    order = np.argsort(number, kind="stable")
    begins = np.concatenate([[0], np.cumsum(np.bincount(number, minlength=len(of) + rows))])
    starts = np.concatenate([firsts[of] + nth * row, firsts[left] + whole[left] * row])
    sized = np.concatenate([np.full(len(of), row), rest[left]])
    return Rows(begins.astype(np.int64), starts[order].astype(np.int64), sized[order].astype(np.int32))


def _best_fit(lengths: list[int], counts: list[int], row: int) -> tuple[list[Ints], int]:
    """The numbers of the rows of so many pieces of each length, the longest first, in order; and how many rows that is.

    Each goes where it leaves least room: into the row that took the last one, as long as it fits.
    """
    room: dict[int, list[Ints]] = {}
    """Numbers of rows by the room that is left in them, the last of which is taken first."""
    sizes: list[int] = []
    found: list[Ints] = []
    rows = 0

    def leave(size: int, which: Ints) -> None:
        if size and len(which):
            if size not in room:
                insort(sizes, size)
            room.setdefault(size, []).append(which)

    for length, pieces in zip(lengths, counts, strict=True):
        while pieces:
            place = bisect_left(sizes, length)
            size = row if place == len(sizes) else sizes[place]
            each = size // length
            if place == len(sizes):
                chosen = np.arange(rows, rows + -(-pieces // each))
                rows += len(chosen)
            else:
                stack = room[size]
                chosen = stack.pop()[::-1]
                most = -(-pieces // each)
                if len(chosen) > most:
                    stack.append(chosen[most:][::-1])
                    chosen = chosen[:most]
                if not stack:
                    del room[size], sizes[place]
            taken = min(pieces, each * len(chosen))
            found.append(np.repeat(chosen, each)[:taken])
            full, part = divmod(taken, each)
            leave(size - each * length, chosen[:full])
            leave(size - part * length, chosen[full:])
            pieces -= taken
    return found, rows


def waste(rows: Rows, row: int) -> float:
    """Share of the rows that holds no token."""
    return 1 - int(rows.lengths.sum(dtype=np.int64)) / max(1, row * len(rows))
