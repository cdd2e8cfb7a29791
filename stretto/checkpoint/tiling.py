"""Do rectangles tile a tensor: inside it, none over another, nothing left out?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

_MOST = 8
"""Overlaps that are named; whoever has one of them can have a million."""


def tiling_errors(shape: Sequence[int], chunks: Sequence[ChunkStorageMetadata]) -> list[str]:
    """What is wrong with non-empty `chunks` as a tiling of a tensor of `shape`; empty when they tile it.

    Inside, pairwise disjoint and of the right total volume is the same as tiling.
    """
    outside = [c for c in chunks if any(not _inside(*d) for d in zip(c.offsets, c.sizes, shape, strict=True))]
    if outside:
        return [f"{_text(c)} does not lie inside {tuple(shape)}" for c in outside]
    if overlaps := _overlaps(shape, chunks):
        return [f"{_text(a)} overlaps {_text(b)}: one of them must not be owner" for a, b in overlaps]
    volume = sum(math.prod(c.sizes) for c in chunks)
    if volume != math.prod(shape):
        return [f"owners hold {volume} of {math.prod(shape)} elements of {tuple(shape)}"]
    return []


def _inside(offset: int, size: int, extent: int) -> bool:
    return offset >= 0 and offset + size <= extent


def _overlaps(
    shape: Sequence[int], chunks: Sequence[ChunkStorageMetadata]
) -> list[tuple[ChunkStorageMetadata, ChunkStorageMetadata]]:
    """Overlapping pairs: sort along the dim with the most cuts; compare with what begins before one ends.

    A thousand shards along one dimension then cost a thousand comparisons, not a million.
    """
    if not shape:
        return list(pairwise(chunks))
    sweep = max(range(len(shape)), key=lambda dim: len({c.offsets[dim] for c in chunks}))
    ordered = sorted(chunks, key=lambda c: c.offsets[sweep])
    found = []
    for i, a in enumerate(ordered):
        end = a.offsets[sweep] + a.sizes[sweep]
        for b in ordered[i + 1 :]:
            if b.offsets[sweep] >= end:
                break
            if _overlap(a, b):
                found.append((a, b))
        if len(found) >= _MOST:
            break
    return found


def _overlap(a: ChunkStorageMetadata, b: ChunkStorageMetadata) -> bool:
    dims = zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    return all(at < bt + bn and bt < at + an for at, an, bt, bn in dims)


def _text(chunk: ChunkStorageMetadata) -> str:
    return f"the piece {tuple(chunk.sizes)} at {tuple(chunk.offsets)}"
