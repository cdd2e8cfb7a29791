"""Lists of ranks in a few words: every message names them in this way."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def by_value(said: Iterable[tuple[int, T]]) -> dict[T, list[int]]:
    """What ranks say, each with the ranks that say it, in the order in which it is first said."""
    ranks: dict[T, list[int]] = {}
    for rank, value in said:
        ranks.setdefault(value, []).append(rank)
    return ranks


def ranges(ranks: Iterable[int], most: int = 64, comma: str = ", ") -> str:
    """Ranks in a row as one: [0, 1, 2, 5] -> "0-2, 5". Of more than `most` rows, the first ones and the last:
    "0, 8, .., 56".
    """
    rows: list[list[int]] = []
    for rank in sorted(ranks):
        if rows and rank == rows[-1][1] + 1:
            rows[-1][1] = rank
        else:
            rows.append([rank, rank])
    shown = [f"{a}-{b}" if a < b else f"{a}" for a, b in rows]
    if len(shown) > most:
        shown[most - 2 : -1] = [".."]
    return comma.join(shown)


def named(ranks: Iterable[int], most: int = 64) -> str:
    """With the word before them: "rank 5", "ranks 0-2, 5"."""
    ranks = list(ranks)
    return f"rank{'s' * (len(ranks) != 1)} {ranges(ranks, most)}"
