"""Memory that the other GPUs of this host read where it lies, by copy engines.

Sharded weights and gradients are large, have addresses of their own, and stay until all have read them. So nothing is
copied into a buffer first, as a `CopyEngineBuffer` must: a rank says to the others that its part is there, they copy it
to where it is used, and write back that they have. Sums are added by kernels of this rank, in the order of the ranks,
chunk by chunk as they come, on a stream beside the computation.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from stretto.copy_engine import Arrival, Driver, new_stream, shared_memory

CHUNK: Final = 2**26
"""Bytes that come of all other ranks together before they are added."""

_READY, _READ = 0, 1


def _add_sum(out: Tensor, a: Tensor, b: Tensor) -> None:
    out.add_(a + b)


def _all_but_last(parts: list[Tensor], own: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of all parts but the last, in their order, in what another rank's part was in; and the last."""
    total, *between, last = parts
    for each in between:
        total = torch.add(total, each, out=each if total is own else total)
    return total, last


@dataclass
class _Region:
    """A tensor that the others read: its address at each rank, its bytes, and the last message that is made of it."""

    at: list[int]
    nbytes: int
    last: int = 0


class CopyEngineMemory:
    """A `stretto.world.PeerMemory` over the ranks of `group`, all of them GPUs of one host that reach each other."""

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self.rank, self.size, self.device, self._group = group.rank(), group.size(), device, group
        self._others = [(self.rank + n) % self.size for n in range(1, self.size)]  # not all read of the same at once
        self._flags, self._at = self._shared(4 * 2 * self.size, torch.uint8)
        self.nbytes = 0
        """What this rank has in it; torch's allocator knows nothing of that."""
        self._regions: dict[int, _Region] = {}
        self._stream, self._adding = new_stream(device), new_stream(device)
        self._driver = Driver(self._stream)
        self._number = 0
        self._add_sum = torch.compile(_add_sum, dynamic=True)  # one kernel, which reads each of the three once
        self._scratch: list[Tensor] = []
        self._scratch_free: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """[numel] of 0; all ranks ask for as much."""
        memory, at = self._shared(numel, dtype)
        self._regions[memory.data_ptr()] = _Region(at, memory.nbytes)
        self.nbytes += memory.nbytes
        return memory

    def holds(self, x: Tensor) -> bool:
        """Whether `x` lies in such memory."""
        return self._region(x) is not None

    def gather_into(self, out: Tensor, x: Tensor) -> Arrival:
        """See `stretto.world.PeerMemory`."""
        size, to = x.nbytes, out.data_ptr()
        place = x.data_ptr() - self.rank * size == to  # in its own part of `out`, as that of the others is in theirs
        region = self._begin(x)
        for peer in self._others:
            self._driver.wait(self._flag(self.rank, _READY, peer), self._number)
            self._driver.copy(to + peer * size, region.at[peer] + peer * size * place, size)
            self._driver.write(self._flag(peer, _READ, self.rank), self._number)
        if not place:
            self._driver.copy(to + self.rank * size, x.data_ptr(), size)
        return Arrival(self._stream.record_event(), (out, x))

    def sum_into(self, out: Tensor, x: Tensor, *, add: bool = False) -> Arrival:
        """See `stretto.world.PeerMemory`."""
        own = x[self.rank * out.numel() : (self.rank + 1) * out.numel()]
        region = self._begin(x)
        self._adding.wait_stream(torch.cuda.current_stream(self.device))
        for peer in self._others:
            self._driver.wait(self._flag(self.rank, _READY, peer), self._number)
        each = CHUNK // (self.size - 1) // 512 * 512 // x.element_size()
        for begin in range(0, out.numel(), each):
            part = slice(begin, min(begin + each, out.numel()))
            self._add(out[part], own[part], region, self.rank * out.nbytes + begin * x.element_size(), add=add)
        for peer in self._others:
            self._driver.write(self._flag(peer, _READ, self.rank), self._number)
        return Arrival(self._adding.record_event(), (out, x))

    def settle(self, x: Tensor) -> None:
        """See `stretto.world.PeerMemory`."""
        region = self._region(x)
        if region is not None and region.last:
            driver = Driver(torch.cuda.current_stream(self.device))
            for peer in self._others:
                driver.wait(self._flag(self.rank, _READ, peer), region.last)
            region.last = 0

    def release(self) -> None:
        """Let nothing of this rank wait for the others any more: they may be gone."""
        driver = Driver(new_stream(self.device))
        for kind, of in product((_READY, _READ), range(self.size)):
            driver.write(self._flag(self.rank, kind, of), self._number + 2**30)

    def _add(self, out: Tensor, own: Tensor, region: _Region, offset: int, *, add: bool) -> None:
        """One chunk: what the others have of it comes, and is added in the order of the ranks."""
        turn = self._turn = 1 - self._turn
        if not self._scratch:
            self._scratch = [torch.empty(CHUNK, dtype=torch.uint8, device=self.device) for _ in range(2)]
            self._adding.wait_stream(torch.cuda.current_stream(self.device))
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        if (free := self._scratch_free[turn]) is not None:
            self._stream.wait_event(free)
        room = torch.split(self._scratch[turn].view(out.dtype), out.numel())
        parts = {self.rank: own}
        for peer, into in zip(self._others, room, strict=False):
            self._driver.copy(into.data_ptr(), region.at[peer] + offset, into.nbytes)
            parts[peer] = into
        self._adding.wait_event(self._stream.record_event())
        with torch.cuda.stream(self._adding):
            first, last = _all_but_last([parts[rank] for rank in range(self.size)], own)
            if add:
                self._add_sum(out, first, last)
            else:
                torch.add(first, last, out=out)
            self._scratch_free[turn] = self._adding.record_event()

    def _begin(self, x: Tensor) -> _Region:
        """Say that `x` of this rank can be read."""
        region = self._region(x)
        assert region is not None
        self._number += 1
        region.last = self._number
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        for peer in self._others:
            self._driver.write(self._flag(peer, _READY, self.rank), self._number)
        return region

    def _region(self, x: Tensor) -> _Region | None:
        base = x.untyped_storage().data_ptr()
        found = self._regions.get(base)
        return found if found is not None and x.untyped_storage().nbytes() == found.nbytes else None

    def _shared(self, numel: int, dtype: torch.dtype) -> tuple[Tensor, list[int]]:
        """Memory of 0, and where it is at each rank."""
        return shared_memory(self._group, self.device, numel, dtype)

    def _flag(self, at: int, kind: int, of: int) -> int:
        """Address of one of rank `at`'s flags, that rank `of` writes."""
        return self._at[at] + 4 * (kind * self.size + of)
