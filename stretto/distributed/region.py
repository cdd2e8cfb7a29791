"""Memory that other ranks read gradients from, which the buckets of one size class have in turns."""

from __future__ import annotations

from collections.abc import Sequence
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


def take_turns(buckets: Sequence[tuple[Axis, int, torch.dtype]], number: int) -> list[Region | None]:
    """A region for each of some buckets, which fill one after the other; None where nobody reads them there.

    Those of one axis and dtype have `number`, each as large as the largest that is to be in it.
    """
    classes: dict[tuple[Axis, torch.dtype], list[int]] = {}
    for n, (axis, _, dtype) in enumerate(buckets):
        classes.setdefault((axis, dtype), []).append(n)
    found: list[Region | None] = [None] * len(buckets)
    for (axis, dtype), members in classes.items():
        for mine in (members[turn::number] for turn in range(number)):
            if mine and axis.peer_memory is not None:
                memory = axis.peer_memory.empty(max(buckets[n][1] for n in mine), dtype)
                region = Region(memory, axis.peer_memory)
                for n in mine:
                    found[n] = region
    return found
