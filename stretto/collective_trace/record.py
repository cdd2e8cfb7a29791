"""`Recorder`: what this rank communicates, in order. `ParallelState.build(..., tracer=Recorder())` fills it."""

from __future__ import annotations

from collections import deque
from types import CodeType

import torch
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]  # public, but not in __all__

from stretto.collective_trace.call import CollectiveCall, caller, site
from stretto.world import Axis, Observer, World

Raw = tuple[str, str, tuple[int, ...], int, str, torch.Size, torch.dtype, tuple[CodeType | None, int, CodeType | None]]
"""A `CollectiveCall` before anybody wants to read it: recording takes a third of the time then."""


class Recorder:
    """The calls of one rank in one parallel state.

    `keep` bounds how many of the newest are kept; None keeps all.
    """

    def __init__(self, keep: int | None = None) -> None:
        self.groups: dict[str, tuple[str, tuple[int, ...]]] = {}
        """The process groups: their first axis, and their ranks."""
        self._raw: deque[Raw] = deque(maxlen=keep)
        self._numbers: dict[str, int] = {}

    @property
    def calls(self) -> list[CollectiveCall]:
        """What was recorded, in order."""
        return [_readable(raw) for raw in self._raw]

    def attach(self, world: World, store: Store) -> None:
        """A parallel state is about to be built on `world`; `store` is for its tracer alone."""

    def group(self, name: str, axis: str, ranks: tuple[int, ...]) -> Observer:
        """The watch of one process group; all axes that use the group share it, `axis` is the first."""
        self.groups[name] = axis, ranks
        return _Group(self, name, ranks)

    def record(self, axis: str, channel: str, ranks: tuple[int, ...], op: str, x: Tensor) -> None:
        """Record what is about to be issued."""
        number = self._numbers.get(channel, 0)
        self._numbers[channel] = number + 1
        self._raw.append((axis, channel, ranks, number, op, x.shape, x.dtype, caller()))

    def clear(self) -> None:
        """Forget the calls so far; numbers go on."""
        self._raw.clear()

    def close(self) -> None:
        """The state is about to be closed in good order."""

    def failed(self, error: BaseException) -> None:
        """The state is about to be left because of `error`."""

    def left(self, error: BaseException) -> None:
        """The state has been left."""


class _Group:
    """The calls over one process group."""

    def __init__(self, recorder: Recorder, name: str, ranks: tuple[int, ...]) -> None:
        self.recorder, self.name, self.ranks = recorder, name, ranks

    def __call__(self, axis: Axis, op: str, x: Tensor, ends: tuple[int, int] | None = None) -> None:
        """A collective; or with `ends`, places on the axis, a message from the first to the second."""
        if ends is None:
            self.recorder.record(axis.name, self.name, self.ranks, op, x)
        else:
            source, to = (self.ranks[end] for end in ends)
            self.recorder.record(axis.name, f"{self.name} {source}->{to}", (source, to), op, x)


def _readable(raw: Raw) -> CollectiveCall:
    axis, channel, ranks, number, op, shape, dtype, place = raw
    name = str(dtype).removeprefix("torch.")
    return CollectiveCall(
        axis, channel, ranks, number, op, tuple(shape), name, shape.numel() * dtype.itemsize, site(*place)
    )
