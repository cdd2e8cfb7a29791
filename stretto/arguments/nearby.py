"""Candidates for a valid setting near an invalid one, the nearest first."""

from __future__ import annotations

from collections.abc import Iterable
from math import isqrt, lcm

_LIMIT = 4096
"""How far to search: settings are this large at most, and numbers that are mistyped can be of any size."""


def multiples(value: int, of: int) -> tuple[int, ...]:
    """Positive multiples of `of` around `value`."""
    below = value // of * of
    return by_distance(value, (below - of, below, below + of, below + 2 * of))


def granule(value: int) -> int:
    """What the size of a matrix or of a sequence should be a multiple of: fast kernels work on tiles of so many."""
    return 64 if value >= 64 else 8


def sizes(value: int, of: int) -> tuple[int, ...]:
    """Positive multiples of `of` around `value`, and those among them that are round."""
    return by_distance(value, (*multiples(value, of), *multiples(value, lcm(of, granule(value)))))


def divisors(n: int, near: int) -> tuple[int, ...]:
    """Divisors of n around `near`: all up to a limit, and what they leave of n."""
    small = [d for d in range(1, min(isqrt(n), _LIMIT) + 1) if n % d == 0]
    return by_distance(near, (*small, *(n // d for d in small)))


def even_split(total: int, parts: int) -> tuple[tuple[int, ...], ...]:
    """The split of `total` into parts that differ by one at most; none where that would be too long to read."""
    if parts > _LIMIT:
        return ()
    return (tuple(total // parts + (part < total % parts) for part in range(parts)),)


def by_distance(value: int, candidates: Iterable[int]) -> tuple[int, ...]:
    """The positive candidates other than `value` itself; at equal distance the smaller comes first."""
    return tuple(sorted({c for c in candidates if c > 0 and c != value}, key=lambda c: (abs(c - value), c)))
