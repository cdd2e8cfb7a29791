"""Plain handles that say where this process is: a `World` of ranks, and an `Axis` of them.

They are values, passed as arguments; nothing here creates or looks up a process group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Store  # type: ignore[attr-defined]  # public, but not in __all__


@dataclass(frozen=True)
class World:
    """The ranks that run together, as this process sees them.

    `ranks[i]` is the rank in torch's default process group of this world's rank `i`. A training run has
    the identity; a world inside a larger pool of processes (tests, two layouts in one process) has a part.
    `store` is the rendezvous store that all ranks share; None when the world is this process alone.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    backend: str
    ranks: tuple[int, ...]
    store: Store | None = None
    source: str = "single process"

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> World:
        """A world of this process alone; needs no process group."""
        return cls(0, 1, 0, 1, torch.device(device), "none", (0,))


class Watch(Protocol):
    """Is told of each communication over an axis, on every rank that takes part, right before it is issued."""

    def __call__(self, axis: Axis, op: str, x: Tensor, ends: tuple[int, int] | None = None) -> None:
        """A collective with input `x`; or with `ends`, places on the axis, a message from the first to the second."""


@dataclass(frozen=True)
class Axis:
    """One communicator as this rank sees it.

    `ranks` are ranks of the layout, in order along the axis; `ranks[rank]` is this process. `group` is
    None exactly when the axis has size 1: every collective over such an axis is a no-op. `watch`, if any, hears of
    all that goes over the group.
    """

    name: str
    rank: int
    ranks: tuple[int, ...]
    group: ProcessGroup | None = None
    watch: Watch | None = field(default=None, compare=False, repr=False)

    @property
    def size(self) -> int:
        """Number of ranks on the axis."""
        return len(self.ranks)

    @classmethod
    def single(cls, name: str, rank: int = 0) -> Axis:
        """An axis of size 1: this rank (its number in the layout) alone."""
        return cls(name, 0, (rank,))

    def __str__(self) -> str:
        return f"{self.name}{list(self.ranks)}"
