"""Numbers by what they are for, which add up."""

from __future__ import annotations

from operator import add
from typing import Self


class Amounts:
    """Of a dataclass whose fields are numbers of one unit."""

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(vars(self).values()))

    def __add__(self, other: Self) -> Self:
        return type(self)(*map(add, vars(self).values(), vars(other).values()))

    def times(self, n: float) -> Self:
        """As often."""
        return type(self)(*(n * each for each in vars(self).values()))
