"""How tensors lie one behind the other in flat storage, cut into equal shards; and what of a tensor a cut leaves.

A shard is a contiguous range, so collectives write where GEMMs read and read where they wrote. A range of a
tensor is no rectangle, but at most three: the end of a row, whole rows, the beginning of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import Final

ALIGNMENT: Final = 64
"""Elements: every tensor and every shard begins at a multiple of 128 bytes at least, as matrix units and vector loads
want."""


@dataclass(frozen=True)
class Flat:
    """Tensors of `sizes` elements, aligned, and padded to `shards` equal shards."""

    sizes: tuple[int, ...]
    shards: int = 1

    @cached_property
    def spans(self) -> tuple[range, ...]:
        """Where each tensor lies."""
        spans, end = [], 0
        for size in self.sizes:
            spans.append(range(end, end + size))
            end = _up(end + size, ALIGNMENT)
        return tuple(spans)

    @cached_property
    def numel(self) -> int:
        """Elements of the storage."""
        return _up(sum(_up(size, ALIGNMENT) for size in self.sizes), ALIGNMENT * self.shards)

    def shard(self, rank: int) -> range:
        """The elements of a shard."""
        size = self.numel // self.shards
        return range(rank * size, (rank + 1) * size)

    @cached_property
    def gaps(self) -> tuple[range, ...]:
        """What belongs to no tensor."""
        ends = [*self.spans, range(self.numel, self.numel)]
        first = [range(ends[0].start)] if ends[0].start else []
        return tuple(first + [range(a.stop, b.start) for a, b in pairwise(ends) if a.stop < b.start])


@dataclass(frozen=True)
class Rectangle:
    """Part of a row-major tensor that is contiguous in memory, from element `start` on."""

    start: int
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    def common(self, at: Sequence[int], shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Offsets and shape of what of it lies in a block of this shape at `at`."""
        low = tuple(map(max, self.offsets, at))
        ends = zip(low, self.offsets, self.shape, at, shape, strict=True)
        return low, tuple(max(0, min(o + n, a + k) - begin) for begin, o, n, a, k in ends)


def rectangles(shape: Sequence[int], part: range) -> Iterator[Rectangle]:
    """The elements `part` of a row-major tensor, in order: of a matrix at most 3 rectangles, of d dims 2d - 1."""
    if not part:
        return
    if not shape:
        yield Rectangle(0, (), ())
        return
    row = prod(shape[1:])
    (first, begin), (last, end) = divmod(part.start, row), divmod(part.stop, row)
    if begin:
        yield from _in_row(shape, first, range(begin, end if first == last else row))
    if first + bool(begin) < last:
        top = first + bool(begin)
        yield Rectangle(top * row, (top, *[0] * (len(shape) - 1)), (last - top, *shape[1:]))
    if end and not (begin and first == last):
        yield from _in_row(shape, last, range(end))


def overlap(a: range, b: range) -> range:
    """What two ranges share."""
    start = max(a.start, b.start)
    return range(start, max(start, min(a.stop, b.stop)))


def _in_row(shape: Sequence[int], row: int, part: range) -> Iterator[Rectangle]:
    size = prod(shape[1:])
    for inner in rectangles(shape[1:], part):
        yield Rectangle(row * size + inner.start, (row, *inner.offsets), (1, *inner.shape))


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
