"""Memory that other ranks read gradients from, which the buckets of one size class have in turns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Protocol

import torch
from torch import Tensor

from stretto.world import Axis, PeerMemory


class Holder(Protocol):
    """A bucket, to a region."""

    def give_way(self) -> None:
        """Have no gradients in the region any more: wait until they are reduced, or take them elsewhere."""


class Region:
    """One such memory. A message about a bucket's gradients is always about its region, whichever way they got there:
    so ranks agree on it even where their graphs differ."""

    def __init__(self, memory: Tensor, peers: PeerMemory) -> None:
        self._memory, self._peers = memory, peers
        self._holder: Holder | None = None

    def enter(self, bucket: Holder, numel: int) -> Tensor:
        """[numel] for the gradients of `bucket`, as soon as nobody reads there; another bucket gives way."""
        if self._holder is not None:
            self._holder.give_way()
        self._holder = bucket
        self._peers.settle(self._memory)
        return self._memory[:numel]

    def filled(self, bucket: Holder, grads: Tensor) -> Tensor:
        """The gradients of a bucket in the region: it is there already, unless it had to give way."""
        return grads if self._holder is bucket else self.enter(bucket, grads.numel()).copy_(grads)

    def leave(self, bucket: Holder) -> None:
        """The gradients are reduced, or forgotten."""
        if self._holder is bucket:
            self._holder = None


def regions(axis: Axis, sizes: Iterable[int], dtype: torch.dtype, number: int) -> Sequence[Region]:
    """So many regions, each as large as the largest of what is to be in them; none where nobody reads them."""
    peers, largest = axis.peer_memory, max(sizes, default=0)
    return [Region(peers.empty(largest, dtype), peers) for _ in range(number)] if peers and largest else []


def take_turns(buckets: Sequence[tuple[Axis, int, torch.dtype]], number: int) -> list[Region | None]:
    """A region for each of some buckets, which fill one after the other; those of one axis and dtype share `number`."""
    classes: dict[tuple[Axis, torch.dtype], list[int]] = {}
    for axis, size, dtype in buckets:
        classes.setdefault((axis, dtype), []).append(size)
    turns = {kind: cycle(regions(kind[0], sizes, kind[1], number) or [None]) for kind, sizes in classes.items()}
    return [next(turns[axis, dtype]) for axis, _, dtype in buckets]
