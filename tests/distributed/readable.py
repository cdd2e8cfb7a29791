"""Memory that other ranks read, in a process without GPUs: collectives bring what copy engines would.

It notices what a copy engine would not: that something is written before the others are known to have read it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from stretto.collectives import all_gather_into, reduce_scatter_into
from stretto.parallel_state import ParallelState
from stretto.world import Axis, Done, Work


class Readable:
    """A `stretto.world.PeerMemory` over the group of an axis."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.memory: list[Tensor] = []
        self.read: dict[int, tuple[Tensor, Tensor]] = {}
        self.messages = 0

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        self.memory.append(torch.zeros(numel, dtype=dtype))
        return self.memory[-1]

    def holds(self, x: Tensor) -> bool:
        return any(x.untyped_storage().data_ptr() == m.data_ptr() for m in self.memory)

    def gather_into(self, out: Tensor, x: Tensor) -> Work:
        self._begin(x)
        found = torch.empty_like(out)
        all_gather_into(found, x.clone(), self.axis).wait()
        out.copy_(found)
        return Done()

    def sum_into(self, out: Tensor, x: Tensor, *, add: bool = False) -> Work:
        self._begin(x)
        found = torch.empty_like(out)
        reduce_scatter_into(found, x.clone(), self.axis).wait()
        begin = self.axis.rank * out.numel()
        own = x[begin : begin + out.numel()].data_ptr() == out.data_ptr()
        out.add_(found) if add else out.copy_(found)
        if own:  # the others do not read what is this rank's
            del self.read[x.untyped_storage().data_ptr()]
        return Done()

    def settle(self, x: Tensor) -> None:
        view, then = self.read.pop(x.untyped_storage().data_ptr(), (x[:0], x[:0]))
        assert torch.equal(view.view(torch.uint8), then.view(torch.uint8)), "written before the others have read it"

    def _begin(self, x: Tensor) -> None:
        self.settle(x)
        self.messages += 1
        self.read[x.untyped_storage().data_ptr()] = x, x.clone()


def make_readable(state: ParallelState) -> list[Readable]:
    """Let the axes of dp have such memory."""
    made = []
    for names, axis in state._axes.items():
        if axis.size > 1 and any(name.startswith("dp") for name in names):
            made.append(Readable(axis))
            state._axes[names] = replace(axis, peer_memory=made[-1])
    return made
