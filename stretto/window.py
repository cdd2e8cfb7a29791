"""Memory that the other GPUs of this host read, by copy engines.

A large matrix product has one block on each multiprocessor for as long as it lasts, and a kernel of NCCL is made of
blocks too: what is issued beside a product runs before or after it, so nothing is hidden (`benchmarks/spike_overlap.py`
has the figures). Copy engines need no multiprocessor.

A rank puts what others are to read into a slot of its window and writes the number of the message into their flags,
they copy it and write the number back. All of that lies on a stream of its own, and neither the host nor a kernel waits
for a flag: the stream itself does (`cuStreamWaitValue32`). A slot is used again when all have read it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from stretto.world import Rows, UnderWay

SLOTS: Final = 3
LEAST: Final = 2**18
"""Bytes; what is less is at its peer sooner through NCCL."""

_ALIGNMENT: Final = 512
_READY, _READ = 0, 1
_GREATER_OR_EQUAL: Final = 0  # of two numbers that may wrap: CU_STREAM_WAIT_VALUE_GEQ


class PeerWindow:
    """A `stretto.world.Window` over the ranks of `group`, all of them GPUs of one host that reach each other.

    All ranks make it together. `largest` is the number of bytes that a rank may read of another in one message.
    """

    def __init__(self, group: ProcessGroup, device: torch.device, largest: int) -> None:
        import torch.distributed._symmetric_memory as symmetric

        self.rank, self.size, self.device = group.rank(), group.size(), device
        self._part = -(-largest // _ALIGNMENT) * _ALIGNMENT
        self._flags_at = SLOTS * (self.size - 1) * self._part
        self._memory = symmetric.empty(
            self._flags_at + 4 * 2 * SLOTS * self.size, dtype=torch.uint8, device=device
        ).zero_()
        self._handle = symmetric.rendezvous(self._memory, group.group_name)
        self._handle.barrier()  # nobody's flags are written before they are zero
        self._base = self._memory.data_ptr() - self._handle.buffer_ptrs[self.rank]
        self._stream = _stream(device)
        self._free: list[torch.cuda.Event | None] = [None] * SLOTS
        self._number = 0
        self._write, self._wait = (_driver(f"cuStream{what}Value32_v2") for what in ("Write", "Wait"))

    def takes(self, size: int) -> bool:
        """Whether it has room for a message, and is quicker."""
        return LEAST <= size <= self._part

    def gather(self, x: Tensor) -> UnderWay:
        """x [n, ..] of all ranks, in order."""
        slot = self._begin()
        self._view(self.rank, slot, 0, x).copy_(x)
        whole = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        parts = whole.chunk(self.size)
        self._offer(slot, self._others)
        for peer in self._others:
            self._fetch(slot, peer, 0, parts[peer])
        with torch.cuda.stream(self._stream):
            parts[self.rank].copy_(x)
        return UnderWay(whole, self._end(slot, x))

    def scatter(self, rows: Rows, like: Tensor) -> UnderWay:
        """The sum over the ranks of this one's rows."""
        slot = self._begin()
        out, *got = (torch.empty(like.shape, dtype=like.dtype, device=self.device) for _ in range(self.size))
        for peer in self._others:
            rows(peer, self._view(self.rank, slot, self._place(peer, self.rank), like))
            self._offer(slot, [peer])
        for peer, into in zip(self._others, got, strict=True):
            self._fetch(slot, peer, self._place(self.rank, peer), into)
        own = rows(self.rank, None)

        def add() -> None:
            torch.add(own, got[0], out=out)
            for other in got[1:]:
                out.add_(other)

        return UnderWay(out, self._end(slot, got, add))

    def release(self) -> None:
        """Let nothing of this rank wait for the others any more: they may be gone.

        Without a kernel: to load one may take a device that has nothing left to do.
        """
        stream = _stream(self.device)
        for kind, slot, of in product((_READY, _READ), range(SLOTS), range(self.size)):
            self._call(self._write, self._flag(self.rank, kind, slot, of), stream, self._number + 2**30)

    @property
    def _others(self) -> list[int]:
        """From the next one on, so that not all read of the same."""
        return [(self.rank + n) % self.size for n in range(1, self.size)]

    def _place(self, reader: int, owner: int) -> int:
        """Which part of the owner's slot is the reader's."""
        return (reader - owner) % self.size - 1

    def _view(self, owner: int, slot: int, place: int, like: Tensor) -> Tensor:
        start = (slot * (self.size - 1) + place) * self._part + self._base
        found: Tensor = self._handle.get_buffer(owner, like.shape, like.dtype, start // like.itemsize)
        return found

    def _begin(self) -> int:
        """The slot of the next message, when the current stream may write into it."""
        self._number += 1
        slot = self._number % SLOTS
        if (free := self._free[slot]) is not None:
            torch.cuda.current_stream(self.device).wait_event(free)
        return slot

    def _offer(self, slot: int, readers: Iterable[int]) -> None:
        """What the current stream has done so far is in the slot for them."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        for reader in readers:
            self._call(self._write, self._flag(reader, _READY, slot, self.rank))

    def _fetch(self, slot: int, owner: int, place: int, into: Tensor) -> None:
        self._call(self._wait, self._flag(self.rank, _READY, slot, owner))
        with torch.cuda.stream(self._stream):
            into.copy_(self._view(owner, slot, place, into))
        self._call(self._write, self._flag(owner, _READ, slot, self.rank))

    def _end(self, slot: int, keep: object, then: Callable[[], None] | None = None) -> _Arrival:
        arrival = _Arrival(self._stream.record_event(), keep, then)
        for reader in self._others:
            self._call(self._wait, self._flag(self.rank, _READ, slot, reader))
        self._free[slot] = self._stream.record_event()
        return arrival

    def _flag(self, at: int, kind: int, slot: int, of: int) -> int:
        """Address of one of rank `at`'s flags, that rank `of` writes."""
        place = (kind * SLOTS + slot) * self.size + of
        return int(self._handle.buffer_ptrs[at]) + self._base + self._flags_at + 4 * place

    def _call(
        self, function: Any, address: int, stream: torch.cuda.Stream | None = None, number: int | None = None
    ) -> None:
        """Let the window's own stream write the number of the message that is being issued, or wait for it."""
        on, what = stream or self._stream, self._number if number is None else number
        flags = _GREATER_OR_EQUAL if function is self._wait else 0
        code = function(on.cuda_stream, address, what & 0xFFFFFFFF, flags)
        if code:
            raise RuntimeError(f"{function.__name__} on {self.device} failed with CUDA error {code}")


class _Arrival:
    """The work of a message; `then` is what is to be done with what has come, and `keep` what must live until then."""

    def __init__(self, event: torch.cuda.Event, keep: object, then: Callable[[], None] | None) -> None:
        self._event, self._keep, self._then = event, keep, then

    def wait(self) -> None:
        """Let the current stream wait."""
        torch.cuda.current_stream().wait_event(self._event)
        if self._then is not None:
            self._then()
        self._keep = self._then = None

    def is_completed(self) -> bool:
        """Whether the device has come so far."""
        return bool(self._event.query())  # type: ignore[no-untyped-call]


def _stream(device: torch.device) -> torch.cuda.Stream:
    """One of high priority: its queue on the device is not that of the streams that compute."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


def _driver(name: str) -> Any:
    """A function of CUDA's driver: (stream, address, value, flags) -> error code."""
    function = getattr(ctypes.CDLL("libcuda.so.1"), name)
    function.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
    function.restype = ctypes.c_int
    return function
