"""What a `ParallelState` tells of its communications, and to whom."""

from __future__ import annotations

from typing import Protocol

from torch.distributed import Store  # type: ignore[attr-defined]

from stretto.world import Observer, World


class Tracer(Protocol):
    """Hears of all that this rank communicates over the groups of a state: see `stretto.collective_trace`."""

    def attach(self, world: World, store: Store) -> None:
        """The groups are about to be created; `store`, shared by all ranks, is for the watchers alone."""

    def group(self, name: str, axis: str, ranks: tuple[int, ...]) -> Observer:
        """What the axes over one group will carry; `axis` is the first of them, `ranks` are those of the layout."""

    def close(self) -> None:
        """The groups are about to be destroyed in good order."""

    def failed(self, error: BaseException) -> None:
        """The groups are about to be left because of `error`."""

    def left(self, error: BaseException) -> None:
        """They are gone; may raise an exception that says more in place of `error`."""
