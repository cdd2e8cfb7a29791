"""Few rows in which every two values of different columns stand together, where some rows do not exist.

Greedy: a row begins with a pair that no row has yet, and takes in each other column what meets most new ones, of equals
what asks for least. (allpairspy leaves pairs out where a filter forbids its first choices.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, product

Row = tuple[object, ...]
Partial = tuple[object, ...]
"""A row in which None stands where nothing is chosen yet."""


def every_two(
    columns: Sequence[Sequence[object]], possible: Callable[[Partial], bool], cost: Callable[[Partial], float]
) -> list[Row]:
    """Rows of one value a column; `possible` says whether some row has what is chosen, `cost` what it asks for."""
    n = range(len(columns))
    left = {
        (i, a, j, b): None
        for i, j in combinations(n, 2)
        for a, b in product(columns[i], columns[j])
        if possible(_with(_with((None,) * len(columns), i, a), j, b))
    }
    rows: list[Row] = []
    while left:
        i, a, j, b = next(iter(left))
        row = _with(_with((None,) * len(columns), i, a), j, b)
        for column in sorted(n, key=lambda c: -len(columns[c])):
            if row[column] is None:
                # One exists: what was chosen so far is possible.
                tried = [_with(row, column, value) for value in columns[column]]
                row = max(filter(possible, tried), key=lambda each: (len(_pairs(each) & left.keys()), -cost(each)))
        for pair in _pairs(row):
            left.pop(pair, None)
        rows.append(row)
    return rows


def _with(row: Partial, column: int, value: object) -> Partial:
    return (*row[:column], value, *row[column + 1 :])


def _pairs(row: Partial) -> set[tuple[int, object, int, object]]:
    chosen = [(i, value) for i, value in enumerate(row) if value is not None]
    return {(i, a, j, b) for (i, a), (j, b) in combinations(chosen, 2)}
