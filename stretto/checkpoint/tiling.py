"""Do rectangles tile a tensor: inside it, none over another, nothing left out?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

Rectangle = tuple[Sequence[int], Sequence[int]]
"""Offsets and sizes."""

_MOST = 8
"""Overlaps that are named; whoever has one of them can have a million."""


def tiling_errors(shape: Sequence[int], pieces: Sequence[Rectangle]) -> list[str]:
    """What is wrong with non-empty `pieces` as a tiling of a tensor of `shape`; empty when they tile it.

    Inside, pairwise disjoint and of the right total volume is the same as tiling.
    """
    if errors := disjoint_errors(shape, pieces):
        return errors
    volume = sum(math.prod(sizes) for _, sizes in pieces)
    if volume != math.prod(shape):
        return [f"owners hold {volume} of {math.prod(shape)} elements of {tuple(shape)}"]
    return []


def disjoint_errors(shape: Sequence[int], pieces: Sequence[Rectangle]) -> list[str]:
    """What is wrong with non-empty `pieces` as some of those that tile a tensor of `shape`."""
    outside = [p for p in pieces if any(not _inside(*d) for d in zip(*p, shape, strict=True))]
    if outside:
        return [f"{_text(p)} does not lie inside {tuple(shape)}" for p in outside]
    if overlaps := _overlaps(shape, pieces):
        return [f"{_text(a)} overlaps {_text(b)}: one of them must not be owner" for a, b in overlaps]
    return []


def intersection(a: Rectangle, b: Rectangle) -> Rectangle | None:
    """What two rectangles share; None where that is empty."""
    offsets = [max(x, y) for x, y in zip(a[0], b[0], strict=True)]
    ends = [min(x + n, y + m) for x, n, y, m in zip(a[0], a[1], b[0], b[1], strict=True)]
    sizes = [end - begin for begin, end in zip(offsets, ends, strict=True)]
    return (offsets, sizes) if all(n > 0 for n in sizes) else None


def _inside(offset: int, size: int, extent: int) -> bool:
    return offset >= 0 and offset + size <= extent


def _overlaps(shape: Sequence[int], pieces: Sequence[Rectangle]) -> list[tuple[Rectangle, Rectangle]]:
    """Overlapping pairs: sort along the dim with the most cuts; compare with what begins before one ends.

    A thousand shards along one dimension then cost a thousand comparisons, not a million.
    """
    if not shape:
        return list(pairwise(pieces))
    sweep = max(range(len(shape)), key=lambda dim: len({p[0][dim] for p in pieces}))
    ordered = sorted(pieces, key=lambda p: p[0][sweep])
    found = []
    for i, a in enumerate(ordered):
        end = a[0][sweep] + a[1][sweep]
        for b in ordered[i + 1 :]:
            if b[0][sweep] >= end:
                break
            if intersection(a, b):
                found.append((a, b))
        if len(found) >= _MOST:
            break
    return found


def _text(piece: Rectangle) -> str:
    return f"the piece {tuple(piece[1])} at {tuple(piece[0])}"
