"""One numbering of the ranks: a mixed-radix number whose digits are named axes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod


@dataclass(frozen=True)
class View:
    """Named digits `(name, size)`, fastest first: rank = sum of digit * stride.

    An axis is one digit, as `tp`, or several, as `dp.0` and `dp.1`: its levels, fastest first. The digits of
    an axis need not be neighbours. Every question is answered from the digits alone, in time proportional to
    the answer, so a view of a million ranks costs as much as a view of eight.
    """

    digits: tuple[tuple[str, int], ...]

    @cached_property
    def world(self) -> int:
        """Number of ranks."""
        return prod(size for _, size in self.digits)

    @cached_property
    def strides(self) -> dict[str, int]:
        """Distance in ranks between neighbours along each digit."""
        strides, step = {}, 1
        for name, size in self.digits:
            strides[name] = step
            step *= size
        return strides

    @cached_property
    def levels(self) -> dict[str, tuple[str, ...]]:
        """The digits of every axis, and of every level as an axis of its own."""
        levels: dict[str, tuple[str, ...]] = {}
        for name, _ in self.digits:
            parts = name.split(".")
            for level in (".".join(parts[: depth + 1]) for depth in range(len(parts))):
                levels[level] = (*levels.get(level, ()), name)
        return levels

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """The whole axes, fastest first."""
        return tuple(axis for axis in self.levels if "." not in axis)

    def digits_of(self, axes: Iterable[str]) -> set[str]:
        """The digits that vary along these axes or levels."""
        return {digit for axis in axes for digit in self.levels[axis]}

    def size(self, *axes: str) -> int:
        """Number of ranks along these axes together."""
        digits = self.digits_of(axes)
        return prod(size for name, size in self.digits if name in digits)

    def coords(self, rank: int) -> dict[str, int]:
        """Coordinate of `rank` on each whole axis, fastest axis first."""
        coords: dict[str, int] = dict.fromkeys(self.axes, 0)
        scale = dict.fromkeys(self.axes, 1)
        for name, size in self.digits:
            axis = name.partition(".")[0]
            rank, digit = divmod(rank, size)
            coords[axis] += digit * scale[axis]
            scale[axis] *= size
        return coords

    def rank(self, coords: Mapping[str, int]) -> int:
        """The rank at these coordinates, one for each whole axis; inverse of `coords`."""
        left = dict(coords)
        rank = 0
        for name, size in self.digits:
            axis = name.partition(".")[0]
            left[axis], digit = divmod(left[axis], size)
            rank += digit * self.strides[name]
        return rank

    def origin(self, rank: int, digits: Iterable[str]) -> int:
        """The rank that is like `rank` but at 0 in these digits."""
        sizes = dict(self.digits)
        return rank - sum(rank // self.strides[d] % sizes[d] * self.strides[d] for d in digits)

    def span(self, values: Mapping[str, range], origin: int = 0) -> Sequence[int]:
        """Ranks, ascending, whose digits run over `values`, and otherwise are those of `origin`.

        `origin` is 0 in the digits of `values`.
        """
        ranks: Sequence[int] = range(origin, origin + 1)
        for name, _ in self.digits:
            if name in values:
                run, stride = values[name], self.strides[name]
                steps = range(run.start * stride, run.stop * stride, run.step * stride)
                ranks = _sums(ranks, steps)
        return ranks

    def __str__(self) -> str:
        """Sizes in rank order, as in `tp2-dp4-pp2`, or `tp2-dp.0:4-dp.1:2-pp2` with levels."""
        return "-".join(f"{name}:{size}" if "." in name else f"{name}{size}" for name, size in self.digits)


def _sums(ranks: Sequence[int], steps: range) -> Sequence[int]:
    """All sums of a rank and a step, ranks fastest.

    A `range` where they are evenly spaced, as in most groups: one of 100,000 ranks then costs next to nothing.
    """
    if isinstance(ranks, range):
        start = ranks.start + steps.start
        if len(ranks) == 1:
            return range(start, start + len(steps) * steps.step, steps.step)
        if len(steps) == 1 or steps.step == len(ranks) * ranks.step:
            return range(start, start + len(steps) * len(ranks) * ranks.step, ranks.step)
    return [step + rank for step in steps for rank in ranks]
