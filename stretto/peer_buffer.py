"""Memory that the other GPUs of this host read, by copy engines.

A large GEMM has one block on each multiprocessor for as long as it lasts, and a kernel of NCCL is made of
blocks too: what is issued beside a GEMM runs before or after it, so nothing is hidden (`benchmarks/spike_overlap.py`
has the figures). Copy engines need no multiprocessor.

A rank puts what others are to read into a slot of its buffer and sets a flag at each of them, they copy it and set one
back. All of that lies on a stream of its own, and neither the host nor a kernel waits for a flag: the stream itself
does (`cuStreamWaitValue32`). A slot is used again when all have read it.

A slot is used in two phases by turns, each with a bit of its own: what one use leaves in a flag does not let the next
one pass, nobody puts a flag back, and no number grows from step to step. So messages can be recorded as CUDA graphs,
whose launches have the same numbers each time: between two `rewind`, they are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import prod
from typing import Final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from stretto.copy_engine import ALIGNMENT, LEAST, Arrival, Driver, new_stream, shared_memory
from stretto.world import AsyncTensor, Rows

SLOTS: Final = 3
_READY, _READ = 0, 1
_PHASES: Final = 2


class CopyEngineBuffer:
    """A `stretto.world.PeerBuffer` over the ranks of `group`, all of them GPUs of one host that reach each other.

    All ranks make it together. `largest` is the number of bytes that a rank may read of another in one message.
    """

    def __init__(self, group: ProcessGroup, device: torch.device, largest: int) -> None:
        self.rank, self.size, self.device = group.rank(), group.size(), device
        self._others = [(self.rank + n) % self.size for n in range(1, self.size)]  # not all read of the same at once
        self._part = -(-largest // ALIGNMENT) * ALIGNMENT
        self._flags_at = SLOTS * (self.size - 1) * self._part
        numel = self._flags_at + 4 * 2 * SLOTS * self.size
        self._memory, self._at = shared_memory(group, device, numel, torch.uint8)
        self.nbytes = self._memory.nbytes
        """Of this rank; torch's allocator knows nothing of it."""
        self._stream = new_stream(device)
        self._driver = Driver(self._stream)
        self._free: list[torch.cuda.Event | None] = [None] * SLOTS
        self._views: dict[tuple[int, int, torch.Size, torch.dtype], Tensor] = {}
        self._number, self._bit = 0, 1
        """Messages since the last `rewind`, and what the flags of the current one hold."""

    def takes(self, size: int) -> bool:
        """Whether it has room for a message, and is quicker."""
        return LEAST <= size <= self._part

    def gather(self, x: Tensor) -> AsyncTensor:
        """x [n, ..] of all ranks, in order; contiguous."""
        slot = self._begin()
        self._own(slot, 0, x).copy_(x)
        whole = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        to, size = whole.data_ptr(), x.nbytes
        self._follow()
        for peer in self._others:
            self._offer(slot, peer)
        for peer in self._others:
            self._fetch(slot, peer, self._start(slot, 0), to + peer * size, size)
        self._driver.copy(to + self.rank * size, x.data_ptr(), size)
        return AsyncTensor(whole, self._end(slot, x))

    def scatter(self, rows: Rows, like: Tensor) -> AsyncTensor:
        """The sum over the ranks of this one's rows."""
        slot = self._begin()
        out, *got = (torch.empty(like.shape, dtype=like.dtype, device=self.device) for _ in range(self.size))
        for peer in self._others:
            rows(peer, self._own(slot, self._place(peer, self.rank), like))
            self._follow()
            self._offer(slot, peer)
        for peer, into in zip(self._others, got, strict=True):
            self._fetch(slot, peer, self._start(slot, self._place(self.rank, peer)), into.data_ptr(), like.nbytes)
        own = rows(self.rank, None)

        def add() -> None:
            torch.add(own, got[0], out=out)
            for other in got[1:]:
                out.add_(other)

        return AsyncTensor(out, self._end(slot, got, add))

    def exchange(self, x: Tensor, pairs: Sequence[Sequence[int]], order: Tensor | None = None) -> AsyncTensor:
        """See `stretto.world.PeerBuffer`. What goes to others lies in the slot, without this rank's own, which moves
        while they read."""
        slot, row, me = self._begin(), x.element_size() * prod(x.shape[1:]), self.rank
        before, own = sum(pairs[me][:me]), pairs[me][me]
        end = sum(pairs[me])
        self._rows(slot, 0, x, order, 0, before)
        self._rows(slot, before, x, order, before + own, end)
        out = x.new_empty((sum(of[me] for of in pairs), *x.shape[1:]))
        self._follow()
        for peer in self._others:
            self._offer(slot, peer)
        for peer in self._others:
            theirs = sum(pairs[peer][:me]) - (pairs[peer][peer] if peer < me else 0)
            to = out.data_ptr() + row * sum(of[me] for of in pairs[:peer])
            self._fetch(slot, peer, self._start(slot, 0) + row * theirs, to, row * pairs[peer][me])
        to = sum(of[me] for of in pairs[:me])
        if order is None:
            self._copy(out.data_ptr() + row * to, x.data_ptr() + row * before, row * own)
        elif own:
            torch.index_select(x, 0, order[before : before + own], out=out[to : to + own])
        return AsyncTensor(out, self._end(slot, (out, x) if order is None else out))

    def rewind(self) -> None:
        """See `stretto.world.PeerBuffer`."""
        while self._number % (_PHASES * SLOTS):
            slot = self._begin()  # a message of nothing
            self._follow()
            for peer in self._others:
                self._offer(slot, peer)
            for peer in self._others:
                self._fetch(slot, peer, 0, 0, 0)
            self._end(slot, None)
        if any(self._free):
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self.restart()

    def restart(self) -> None:
        """What was begun since the last `rewind` has not been done, by any rank."""
        self._number, self._free = 0, [None] * SLOTS

    def release(self) -> None:
        """Let nothing of this rank wait for the others any more: they may be gone.

        Without a kernel: to load one may take a device that has nothing left to do.
        """
        driver = Driver(new_stream(self.device))
        for kind, slot, of in product((_READY, _READ), range(SLOTS), range(self.size)):
            driver.write(self._flag(self.rank, kind, slot, of), 2**_PHASES - 1)

    def _place(self, reader: int, owner: int) -> int:
        """Which part of the owner's slot is the reader's."""
        return (reader - owner) % self.size - 1

    def _start(self, slot: int, place: int) -> int:
        return (slot * (self.size - 1) + place) * self._part

    def _own(self, slot: int, place: int, like: Tensor) -> Tensor:
        """A part of this rank's slot, as `like`."""
        key = slot, place, like.shape, like.dtype
        if key not in self._views:
            start = self._start(slot, place)
            self._views[key] = self._memory[start : start + like.nbytes].view(like.dtype).view(like.shape)
        return self._views[key]

    def _rows(self, slot: int, place: int, x: Tensor, order: Tensor | None, begin: int, end: int) -> None:
        """Rows of x, or of x in that order, into this rank's slot, behind so many that lie there."""
        if begin == end:
            return
        start, row = self._start(slot, 0), x.element_size() * prod(x.shape[1:])
        place, shape = start + place * row, (end - begin, *x.shape[1:])
        into = self._memory[place : place + (end - begin) * row].view(x.dtype).view(shape)
        if order is None:
            into.copy_(x[begin:end])
        else:
            torch.index_select(x, 0, order[begin:end], out=into)

    def _begin(self) -> int:
        """The slot of the next message, when the current stream may write into it."""
        slot, self._bit = self._number % SLOTS, 1 << self._number // SLOTS % _PHASES
        self._number += 1
        if (free := self._free[slot]) is not None:
            torch.cuda.current_stream(self.device).wait_event(free)
        return slot

    def _follow(self) -> None:
        """What comes is after all that the current stream has been given."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def _offer(self, slot: int, reader: int) -> None:
        self._driver.write(self._flag(reader, _READY, slot, self.rank), self._bit)

    def _fetch(self, slot: int, owner: int, start: int, to: int, size: int) -> None:
        """So many bytes of the owner's memory, when its slot is full."""
        self._driver.wait_bit(self._flag(self.rank, _READY, slot, owner), self._bit)
        self._copy(to, self._at[owner] + start, size)
        self._driver.write(self._flag(owner, _READ, slot, self.rank), self._bit)

    def _copy(self, to: int, source: int, size: int) -> None:
        if size:
            self._driver.copy(to, source, size)

    def _end(self, slot: int, keep: object, then: Callable[[], None] | None = None) -> Arrival:
        arrival = Arrival(self._stream.record_event(), keep, then)
        for reader in self._others:
            self._driver.wait_bit(self._flag(self.rank, _READ, slot, reader), self._bit)
        self._free[slot] = self._stream.record_event()
        return arrival

    def _flag(self, at: int, kind: int, slot: int, of: int) -> int:
        """Address of one of rank `at`'s flags, that rank `of` writes."""
        return self._at[at] + self._flags_at + 4 * ((kind * SLOTS + slot) * self.size + of)
