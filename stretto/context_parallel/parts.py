"""What tiles give of the same queries, or of the same keys, made one: each number is rounded once, and read seldom.

A tile's output is kept as it comes until it is known what else there is of its queries: most have one tile or two, and
an accumulator in fp32 that each is added to would be written and read more often than they.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

import torch
from torch import Tensor

_MOST: Final = 3
"""Bytes of parts over those of the whole, beyond which those of the same queries are made one."""

Combine = Callable[..., None]
"""Of the tensors to be written, those of one part and those of another."""


class Part(NamedTuple):
    """Tensors [b, heads, n, ..] of `queries` of some rows."""

    rows: slice
    queries: slice
    tensors: tuple[Tensor, ...]

    @property
    def ends(self) -> tuple[int, int]:
        """Of its queries."""
        return self.queries.start, self.queries.stop

    def between(self, begin: int, end: int) -> tuple[Tensor, ...]:
        """Its tensors of some of its queries."""
        first = self.queries.start
        return tuple(x[:, :, begin - first : end - first] for x in self.tensors)


class Parts:
    """Parts of tensors that are like `like` [b, heads, n, d], or as its first dimensions."""

    def __init__(self, like: Tensor, combine: Combine) -> None:
        self._like, self._combine = like, combine
        self._parts: list[Part] = []
        self._bytes = 0

    def add(self, rows: slice, queries: slice, *tensors: Tensor) -> None:
        """What a tile gives."""
        self._parts.append(Part(rows, queries, tensors))
        self._bytes += tensors[0].nbytes
        if self._bytes > _MOST * self._like.nbytes:
            self._parts = [Part(rows, at, self._one(found)) for rows, at, found in self._segments()]
            self._bytes = sum(part.tensors[0].nbytes for part in self._parts)

    @property
    def only(self) -> tuple[Tensor, ...] | None:
        """The tensors of the one part that is the whole."""
        whole = len(self._parts) == 1 and self._parts[0].tensors[0].shape[:3] == self._like.shape[:3]
        return self._parts[0].tensors if whole else None

    def into(self, *whole: Tensor, empty: Sequence[float]) -> None:
        """Write tensors [b, heads, n, ..]; a number of each where there is no part."""
        segments = list(self._segments())
        written = sum(found[0][0].shape[0] * found[0][0].shape[2] for _, _, found in segments)
        if written < whole[0].shape[0] * whole[0].shape[2]:
            for x, value in zip(whole, empty, strict=True):
                x.fill_(value)
        for rows, queries, found in segments:
            views = [x[rows, :, queries] for x in whole]
            if len(found) > 1:
                self._combine(*views, *self._one(found[:-1]), *found[-1])
            else:
                for view, x in zip(views, found[0], strict=True):
                    view.copy_(x)

    def _one(self, found: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        one, *others = found
        wide = torch.promote_types(self._like.dtype, torch.float32)
        for other in others:
            both = tuple(torch.empty_like(x, dtype=wide) for x in one)
            self._combine(*both, *one, *other)
            one = both
        return one

    def _segments(self) -> Iterator[tuple[slice, slice, list[tuple[Tensor, ...]]]]:
        """Which queries of which rows there are the same parts of, and what of these is theirs."""
        by_rows: dict[tuple[int | None, int | None], list[Part]] = {}
        for part in self._parts:
            by_rows.setdefault((part.rows.start, part.rows.stop), []).append(part)
        for parts in by_rows.values():
            coming = sorted(parts, key=lambda part: part.queries.start, reverse=True)
            here: list[Part] = []
            for begin, end in pairwise(sorted({end for part in parts for end in part.ends})):
                here = [part for part in here if part.queries.stop > begin]
                while coming and coming[-1].queries.start == begin:
                    here.append(coming.pop())
                if here:
                    yield parts[0].rows, slice(begin, end), [part.between(begin, end) for part in here]


def add(out: Tensor, one: Tensor, two: Tensor) -> None:
    """The sum of two parts, rounded once: torch adds in fp32, but rounds to the widest of what it is given."""
    if out.element_size() > max(one.element_size(), two.element_size()):
        out.copy_(one).add_(two)
    else:
        torch.add(one, two, out=out)


class Total:
    """The gradient of keys and values [m, b, 2 kv_heads, d], in fp32 or wider: what comes first is written, not added
    to zeros."""

    def __init__(self, kv: Tensor) -> None:
        self._whole = torch.empty_like(kv, dtype=torch.promote_types(kv.dtype, torch.float32))
        self._views = split(self._whole)
        self._written: dict[tuple[int, int], list[tuple[int, int]]] = {}
        """By rows, ranges of keys in order, none of which overlap."""

    def add(self, rows: slice, keys: slice, dk: Tensor, dv: Tensor) -> None:
        """What a tile gives of some keys of some rows."""
        first, last, _ = rows.indices(self._whole.shape[1])
        written = self._written.setdefault((first, last), [])
        for begin, end, new in _cut(written, keys.start, keys.stop):
            part = slice(begin - keys.start, end - keys.start)
            for whole, x in zip(self._views, (dk, dv), strict=True):
                view = whole[rows, :, begin:end]
                (view.copy_ if new else view.add_)(x[:, :, part])
            if new:
                insort(written, (begin, end))

    def result(self) -> Tensor:
        """The whole; zeros where nothing came."""
        m, b = self._whole.shape[:2]
        rest = set(range(b))
        for (first, last), written in self._written.items():
            rest -= set(range(first, last))
            for (_, end), (begin, _) in pairwise([(0, 0), *written, (m, m)]):
                if begin > end:
                    self._whole[end:begin, first:last].zero_()
        for row in rest:
            self._whole[:, row].zero_()
        return self._whole


def _cut(written: list[tuple[int, int]], begin: int, end: int) -> list[tuple[int, int, bool]]:
    """A range, cut where what is written begins and ends; and whether it is new."""
    found, at = [], begin
    for first, last in written[max(0, bisect_left(written, (begin, begin)) - 1) :]:
        if first >= end:
            break
        if last > at:
            if first > at:
                found.append((at, first, True))
            found.append((max(first, at), min(last, end), False))
            at = min(last, end)
    return [*found, (at, end, True)] if at < end else found


def split(kv: Tensor) -> tuple[Tensor, Tensor]:
    """Views of keys and values [b, kv_heads, m, d] of a tensor that has them side by side [m, b, 2 kv_heads, d]."""
    m, b, heads, d = kv.shape
    k, v = kv.view(m, b, heads // 2, 2, d).permute(3, 1, 2, 0, 4)
    return k, v
