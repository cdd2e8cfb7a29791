"""Documents put into rows whole, by best fit (Ding et al., "Fewer truncations improve language modeling", 2024).

A document that is longer than a row is cut into rows, and what is left of it is one more piece; each piece, the longest
first, goes into the row that it leaves least room in. A row's documents do not see each other.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Piece(NamedTuple):
    """`length` tokens from `first` on that are predicted one from another."""

    first: int
    length: int


def pack(lengths: NDArray[np.int64], firsts: NDArray[np.int64], row: int) -> list[tuple[Piece, ...]]:
    """Rows of at most `row` tokens of documents that begin at `firsts`; the same for the same lengths.

    Raises ValueError for a row without room.
    """
    if row < 1:
        raise ValueError(f"rows of {row} tokens hold nothing")
    rows: list[list[Piece]] = []
    rest: dict[int, list[int]] = {}
    for first, length in zip(firsts.tolist(), lengths.tolist(), strict=True):
        whole = length // row
        rows += [[Piece(first + n * row, row)] for n in range(whole)]
        if length % row:
            rest.setdefault(length % row, []).append(first + whole * row)
    room: dict[int, list[int]] = {}
    """Rows by the room that is left in them."""
    sizes: list[int] = []
    for length in sorted(rest, reverse=True):
        for first in rest[length]:
            place = bisect_left(sizes, length)
            if place == len(sizes):
                rows.append([])
                number, left = len(rows) - 1, row
            else:
                left = sizes[place]
                number = room[left].pop()
                if not room[left]:
                    del room[left], sizes[place]
            rows[number].append(Piece(first, length))
            if left > length:
                if left - length not in room:
                    insort(sizes, left - length)
                room.setdefault(left - length, []).append(number)
    return [tuple(pieces) for pieces in rows]


def waste(rows: Sequence[Sequence[Piece]], row: int) -> float:
    """Share of the rows that holds no token."""
    return 1 - sum(piece.length for pieces in rows for piece in pieces) / max(1, row * len(rows))
