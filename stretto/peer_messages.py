"""Messages between two GPUs of one host, by copy engines.

A kernel of NCCL has blocks on several multiprocessors from when a receive is posted until its message is there, and a
large GEMM wants all of them: pipeline messages then slow the computation beside them (`docs/performance.md`). Here the
sender's copy engine puts a message into a slot of memory that the other GPU reads, and the receiver's fetches it from
there. Streams of their own wait for flags; neither the host, nor a kernel, nor the stream that computes does.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from stretto.copy_engine import ALIGNMENT, LEAST, Arrival, Driver, new_stream, shared_memory

SLOTS: Final = 2
"""Of each direction: one is filled while the other is read."""

_READY, _READ = 0, 1


class CopyEngineMessages:
    """A `stretto.world.PeerMessages` between the two ranks of `group`, GPUs of one host that reach each other.

    Both make it together. `largest` is the number of bytes of a message, at most.
    """

    def __init__(self, group: ProcessGroup, device: torch.device, largest: int) -> None:
        if group.size() != 2:
            raise ValueError(f"messages by copy engines are between two ranks, not {group.size()}")
        self._rank, self._device = group.rank(), device
        self._part = -(-largest // ALIGNMENT) * ALIGNMENT
        self._memory, self._at = shared_memory(group, device, SLOTS * self._part + 4 * 2 * SLOTS, torch.uint8)
        self.nbytes = self._memory.nbytes
        """Of this rank; torch's allocator knows nothing of it."""
        self._leaving, self._coming = new_stream(device), new_stream(device)
        self._put, self._fetch = Driver(self._leaving), Driver(self._coming)
        self._sent = self._received = 0

    def takes(self, size: int) -> bool:
        """Whether there is room for a message of so many bytes, and it is worth it."""
        return LEAST <= size <= self._part

    def send(self, x: Tensor) -> Arrival:
        """Contiguous `x` to the other rank; its work is over when `x` may change."""
        self._sent += 1
        slot = self._sent % SLOTS
        self._leaving.wait_stream(torch.cuda.current_stream(self._device))
        if self._sent > SLOTS:
            self._put.wait(self._flag(self._rank, _READ, slot), self._sent - SLOTS)
        self._put.copy(self._slot(self._rank, slot), x.data_ptr(), x.nbytes)
        copied = self._leaving.record_event()
        self._put.write(self._flag(1 - self._rank, _READY, slot), self._sent)
        return Arrival(copied, x)

    def recv(self, out: Tensor) -> Arrival:
        """The other rank's next message into contiguous `out`."""
        self._received += 1
        slot = self._received % SLOTS
        self._coming.wait_stream(torch.cuda.current_stream(self._device))  # until then the memory is another tensor's
        self._fetch.wait(self._flag(self._rank, _READY, slot), self._received)
        self._fetch.copy(out.data_ptr(), self._slot(1 - self._rank, slot), out.nbytes)
        self._fetch.write(self._flag(1 - self._rank, _READ, slot), self._received)
        return Arrival(self._coming.record_event(), out)

    def release(self) -> None:
        """Let nothing of this rank wait for the other any more: it may be gone."""
        driver = Driver(new_stream(self._device))
        for kind, number in ((_READY, self._received), (_READ, self._sent)):
            for slot in range(SLOTS):
                driver.write(self._flag(self._rank, kind, slot), number + 2**30)

    def _slot(self, of: int, slot: int) -> int:
        return self._at[of] + slot * self._part

    def _flag(self, at: int, kind: int, slot: int) -> int:
        """Address of one of rank `at`'s flags, that the other writes."""
        return self._at[at] + SLOTS * self._part + 4 * (kind * SLOTS + slot)
