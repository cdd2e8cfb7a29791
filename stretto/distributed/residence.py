"""Where the vectors of an optimizer lie, and how they come to the device for their update: they are there, or stream.

In the host's memory they cost the device three chunks. Each is copied there, updated by the same kernel as any other,
and copied back, on streams of their own in either direction beside the next step's forward: a bucket's first use waits
for its update. An update on the host would move fewer bytes (6 instead of 24 for each parameter), but reads and writes
its memory as often, computes in other bits, and takes the host's cores.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor

from stretto.layout.chunks import SLOTS, chunks, slot_bytes
from stretto.streams import Stream
from stretto.world import Done, Work

BLOCK: Final = 2**28


class Job(NamedTuple):
    """Vectors that are updated at a time: a range of bucket `bucket`."""

    bucket: int
    part: slice
    last: bool
    """Of its bucket."""
    vectors: tuple[Tensor, ...]
    """Each has the elements `part`, or the end of them."""


class Residence(Protocol):
    """Where vectors lie."""

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A vector, whose values are undefined."""

    def parts(self, numel: int) -> Iterator[range]:
        """What of a vector is updated at a time."""

    def visit(self, jobs: Sequence[Job], update: Callable[[Job, Sequence[Tensor]], object]) -> None:
        """Call `update(job, vectors)` for each job, in order, with vectors on the device that it changes in place."""

    def updating(self) -> Work:
        """Within `visit`: what is over when all updates so far are."""

    def settle(self) -> None:
        """The host sees what the last `visit` wrote."""


class Resident:
    """On the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A vector, whose values are undefined."""
        return torch.empty(numel, dtype=dtype, device=self.device)

    def parts(self, numel: int) -> Iterator[range]:
        """All of it."""
        yield range(numel)

    def visit(self, jobs: Sequence[Job], update: Callable[[Job, Sequence[Tensor]], object]) -> None:
        """Update each where it is."""
        for job in jobs:
            update(job, job.vectors)

    def updating(self) -> Work:
        """What follows on the stream comes after it."""
        return Done()

    def settle(self) -> None:
        """Streams see to it."""


class Streamed:
    """In the host's memory, pinned where the device is a GPU. On a CPU the same chunks are copied, one by one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._blocks: list[_Pinned] = []
        self._slots: list[Tensor] = []
        self._up, self._down, self._side = (Stream.of(device) for _ in range(3))

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A vector in the host's memory, whose values are undefined."""
        if self.device.type != "cuda":
            return torch.empty(numel, dtype=dtype)
        nbytes = slot_bytes(numel, [dtype.itemsize])
        if not self._blocks or self._blocks[-1].left < nbytes:
            self._blocks.append(_Pinned(max(BLOCK, nbytes)))
        return self._blocks[-1].take(nbytes)[: numel * dtype.itemsize].view(dtype)

    def parts(self, numel: int) -> Iterator[range]:
        """A chunk at a time."""
        return chunks(numel)

    def visit(self, jobs: Sequence[Job], update: Callable[[Job, Sequence[Tensor]], object]) -> None:
        """Copy, update and copy back, chunk by chunk; on a GPU all three at once, and none is waited for."""
        self._make_room(jobs)
        self._side.follows(Stream.current(self.device))
        self._up.follows(self._down)  # which wrote back what an earlier step updated
        arrived: list[Work] = []
        left: list[Work] = []
        for n, job in enumerate(jobs):
            for ahead in range(len(arrived), min(n + SLOTS, len(jobs))):
                with self._up.used():
                    if ahead >= SLOTS:
                        left[ahead - SLOTS].wait()
                    _copy(self._in_slot(ahead, jobs[ahead]), jobs[ahead].vectors)
                    arrived.append(self._up.launched())
            held = self._in_slot(n, job)
            with self._side.used():
                arrived[n].wait()
                update(job, held)
                updated = self._side.launched()
            with self._down.used():
                updated.wait()
                _copy(job.vectors, held)
                left.append(self._down.launched())

    def updating(self) -> Work:
        """What has been launched so far beside the computation."""
        return self._side.launched()

    def settle(self) -> None:
        """The host waits."""
        self._down.synchronize()

    def _make_room(self, jobs: Sequence[Job]) -> None:
        size = max((sum(slot_bytes(v.numel(), [v.itemsize]) for v in job.vectors) for job in jobs), default=0)
        if not self._slots or self._slots[0].numel() < size:
            self.settle()
            self._slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(SLOTS)]

    def _in_slot(self, n: int, job: Job) -> list[Tensor]:
        slot, found, at = self._slots[n % SLOTS], [], 0
        for vector in job.vectors:
            found.append(slot[at : at + vector.nbytes].view(vector.dtype))
            at += slot_bytes(vector.numel(), [vector.itemsize])
        return found


class _Pinned:
    """A block of pinned memory. torch's own allocator would round its size up to a power of two."""

    def __init__(self, nbytes: int) -> None:
        self._memory = mmap.mmap(-1, nbytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self.bytes.zero_()  # by many threads; the driver would fetch page after page
        self.left = nbytes
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        status = runtime.cudaHostRegister(self.bytes.data_ptr(), nbytes, 0)
        if int(status) != 0:
            raise MemoryError(f"{nbytes:,} bytes of host memory cannot be pinned (CUDA error {int(status)})")

        self._unregister = runtime.cudaHostUnregister

    def take(self, nbytes: int) -> Tensor:
        """The next bytes of it."""
        start = self.bytes.numel() - self.left
        self.left -= nbytes
        return self.bytes[start : start + nbytes]

    def __del__(self) -> None:
        if hasattr(self, "_unregister"):
            self._unregister(self.bytes.data_ptr())


def _copy(to: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for vector, value in zip(to, values, strict=True):
        vector.copy_(value, non_blocking=True)


def cut(flat: Tensor | None, part: slice, size: int) -> Tensor | None:
    """The part of a flat tensor, or of the end of one of `size` elements: itself where that is all of it."""
    return None if flat is None else end(flat, part, size)


def end(flat: Tensor, part: slice, size: int) -> Tensor:
    """As `cut`, of one that is there."""
    missing = size - len(flat)
    if part.start <= missing and part.stop == size:
        return flat
    return flat[max(0, part.start - missing) : max(0, part.stop - missing)]
