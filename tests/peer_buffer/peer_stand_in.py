"""Copy engines without GPUs: processes share memory, and a stream is a thread of each that works in order.

Pauses that differ from rank to rank change who is ahead of whom: what is read before it is there, or written while it
is read, shows as wrong numbers. What a GPU computes is done at once, by the thread that asks for it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor
from torch.distributed import ProcessGroup, Store  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _resolve_process_group

from stretto import peer_buffer, peer_memory, peer_messages
from stretto.parallel_state.plan import PlannedGroup, downwards
from stretto.parallel_state.reach import Reach
from stretto.peer_buffer import CopyEngineBuffer
from stretto.peer_memory import CopyEngineMemory
from stretto.peer_messages import CopyEngineMessages
from stretto.world import World

PATIENCE = 20.0
"""Seconds."""
ROOM = 2**20
"""Bytes that a rank may read of another in one message."""


class Event(threading.Event):
    """What a stream records."""

    def query(self) -> bool:
        return self.is_set()


class Host:
    """A stream that computes: it is through with all that it was given."""

    def give(self, work: Callable[[], object]) -> None:
        work()

    def record_event(self) -> Event:
        done = Event()
        done.set()
        return done

    def wait_event(self, event: Event) -> None:
        assert event.wait(PATIENCE), "the stream of the messages is not so far"

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


class Stream:
    """That of the messages."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self.given_up = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def give(self, work: Callable[[], object]) -> None:
        self._work.put(work)

    def record_event(self) -> Event:
        event = Event()
        self.give(event.set)
        return event

    def wait_event(self, event: Event) -> None:
        self.give(event.wait)

    def wait_stream(self, other: Host) -> None:
        """All is done there."""

    def end(self, *, give_up: bool) -> None:
        """When all is done; or now, since who should do their part are gone."""
        self.given_up = give_up
        self._work.put(None)
        self._thread.join(PATIENCE)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            if not self.given_up:
                work()


class Driver:
    """`stretto.copy_engine.Driver` of such a stream, with a pause here and there."""

    def __init__(self, stream: Stream | Host, rank: int) -> None:
        self._stream, self._random = stream, random.Random(rank)

    def write(self, address: int, number: int) -> None:
        self._give(setattr, ctypes.c_uint32.from_address(address), "value", number & 0xFFFFFFFF)

    def wait(self, address: int, number: int) -> None:
        self._wait(address, lambda value: value - number >= 0)

    def wait_bit(self, address: int, bit: int) -> None:
        self._wait(address, lambda value: value & bit != 0)

    def _wait(self, address: int, passes: Callable[[int], bool]) -> None:
        flag = ctypes.c_int32.from_address(address)

        def until() -> None:
            while not passes(flag.value) and not getattr(self._stream, "given_up", False):
                time.sleep(0)

        self._give(until)

    def copy(self, to: int, source: int, size: int) -> None:
        self._give(ctypes.memmove, to, source, size)

    def _give(self, work: Callable[..., object], *of: object) -> None:
        pause = self._random.random() * 4e-3 if self._random.random() < 0.2 else 0
        self._stream.give(lambda: (time.sleep(pause), work(*of)))


class Shared:
    """Stands for torch's symmetric memory: each tensor of it is a file."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._files = folder, dict[int, Path]()
        self._handles: list[Handle] = []  # what is mapped stays so

    def empty(self, numel: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        del device
        file = self._folder / f"{os.getpid()}-{len(self._files)}"
        with file.open("wb") as opened:
            opened.truncate(numel * dtype.itemsize)
        memory = _mapped(file).view(dtype)
        self._files[memory.data_ptr()] = file
        return memory

    def rendezvous(self, own: Tensor, name: str) -> Handle:
        group = _resolve_process_group(name)
        files: list[Path] = [Path()] * group.size()
        dist.all_gather_object(files, self._files[own.data_ptr()], group)
        memories = [own if r == group.rank() else _mapped(file) for r, file in enumerate(files)]
        self._handles.append(Handle(memories, group))
        return self._handles[-1]


class Handle:
    """What a rendezvous gives."""

    def __init__(self, memories: list[Tensor], group: ProcessGroup) -> None:
        self._memories, self._group = memories, group
        self.buffer_ptrs = [each.data_ptr() for each in memories]

    def barrier(self) -> None:
        dist.barrier(self._group)


def _mapped(file: Path) -> Tensor:
    with file.open("r+b") as opened:
        return torch.frombuffer(mmap.mmap(opened.fileno(), 0), dtype=torch.uint8)


@contextmanager
def copy_engines(folder: Path, rank: int) -> Iterator[None]:
    """Within, what copy engines serve can be made over processes of this machine, whose files lie in
    a folder; messages go through buffers however small they are."""
    shared, streams = Shared(folder), list[Stream]()

    def new(_: torch.device) -> Stream:
        streams.append(Stream())
        return streams[-1]

    with (
        mock.patch.object(symmetric, "empty", shared.empty),
        mock.patch.object(symmetric, "rendezvous", shared.rendezvous),
        mock.patch.object(peer_buffer, "new_stream", new),
        mock.patch.object(peer_memory, "new_stream", new),
        mock.patch.object(peer_messages, "new_stream", new),
        mock.patch.object(peer_buffer, "Driver", partial(Driver, rank=rank)),
        mock.patch.object(peer_memory, "Driver", partial(Driver, rank=rank)),
        mock.patch.object(peer_messages, "Driver", partial(Driver, rank=rank)),
        mock.patch.object(torch.cuda, "current_stream", return_value=Host()),
        mock.patch.object(torch.cuda, "stream", return_value=nullcontext()),
        mock.patch.object(torch, "compile", lambda function, **_: function),
    ):
        done = False
        try:
            yield
            done = True
        finally:
            for stream in streams:
                stream.end(give_up=not done)


def everywhere(world: World, groups: Mapping[PlannedGroup, ProcessGroup], store: Store) -> dict[PlannedGroup, Reach]:
    """In place of `open_reach`: all groups have what those of one host have on GPUs."""
    del store
    found = {}
    for planned, group in groups.items():
        names = [set(axes) for axes in planned.axes]
        reads = [{"tp"}, {"cp"}, {"etp", "ep"}]
        buffer = CopyEngineBuffer(group, world.device, ROOM) if any(each in reads for each in names) else None
        sharded = any({name.partition(":")[0] for name in each} <= {"dp", "dp.0", "cp"} for each in names)
        sends = any(downwards(axes) for axes in planned.axes) and len(planned.ranks) == 2
        messages = CopyEngineMessages(group, world.device, ROOM) if sends else None
        found[planned] = Reach(buffer, memory_over(group) if sharded else None, messages)
    return found


def memory_over(group: ProcessGroup) -> CopyEngineMemory:
    """One in which the caller adds."""
    made = CopyEngineMemory(group, torch.device("cpu"))
    made._adding = Host()  # type: ignore[assignment]
    return made
