"""Which rank reads what of a model's files, so that every byte is read once, however many ranks hold it.

Rectangles that several ranks hold are put together in packets; each holder reads an equal share of a packet, and they
hand the shares round. All is a function of what each rank holds, so every rank makes the same plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

PACKET: Final = 1 << 26
"""Bytes that are handed round at a time. Two packets are in memory: one arrives while the next one is read."""

Key = tuple[int, tuple[int, ...], tuple[int, ...]]
"""A rectangle of a logical tensor: the number of its name, offsets, shape."""


@dataclass(frozen=True)
class Part:
    """`count` rows from `row` on of a rectangle that some ranks hold."""

    key: Key
    row: int
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the part."""
        shape = self.key[2]
        return (self.count, *shape[1:]) if shape else ()

    @property
    def offsets(self) -> tuple[int, ...]:
        """In the logical tensor."""
        offsets = self.key[1]
        return (offsets[0] + self.row, *offsets[1:]) if offsets else ()

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Packet:
    """Parts of one dtype that the same ranks hold, one behind the other in a flat buffer."""

    holders: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def numel(self) -> int:
        """Elements of all parts."""
        return sum(part.numel for part in self.parts)

    def share(self, rank: int) -> range:
        """The elements that a holder reads."""
        n = -(-self.numel // len(self.holders))
        place = self.holders.index(rank)
        return range(min(place * n, self.numel), min((place + 1) * n, self.numel))


def packets(held: Sequence[Sequence[Key]], itemsize: Mapping[int, int], *, limit: int = PACKET) -> Iterator[Packet]:
    """Who reads what: `held` are the rectangles of each rank, `itemsize` of each name the bytes of an element.

    In the order of the names, the same on every rank; a packet has at most `limit` bytes, or one row of a tensor.
    """
    holders: dict[Key, list[int]] = {}
    for rank, keys in enumerate(held):
        for key in dict.fromkeys(keys):
            holders.setdefault(key, []).append(rank)
    open_: dict[tuple[tuple[int, ...], int], list[Part]] = {}
    for key in sorted(holders):
        if not prod(key[2]):
            continue
        group = tuple(holders[key]), itemsize[key[0]]
        for part in _pieces(key, itemsize[key[0]], limit):
            waiting = open_.setdefault(group, [])
            if waiting and (sum(each.numel for each in waiting) + part.numel) * group[1] > limit:
                yield Packet(group[0], tuple(waiting))
                waiting.clear()
            waiting.append(part)
    for (ranks, _), left in open_.items():
        if left:
            yield Packet(ranks, tuple(left))


def _pieces(key: Key, itemsize: int, limit: int) -> Iterator[Part]:
    shape = key[2]
    if not shape:
        yield Part(key, 0, 1)
        return
    rows = max(1, limit // max(1, itemsize * prod(shape[1:])))
    for row in range(0, shape[0], rows):
        yield Part(key, row, min(rows, shape[0] - row))
