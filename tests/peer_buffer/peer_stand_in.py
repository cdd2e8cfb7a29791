"""A `CopyEngineBuffer` without GPUs: processes share memory, and a stream is a thread of each that works in order.

Pauses that differ from rank to rank change who is ahead of whom: what is read before it is there, or written while it
is read, shows as wrong numbers. What a GPU computes is done at once, by the thread that asks for it.
"""

from __future__ import annotations

import ctypes
import mmap
import queue
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor

from stretto import peer_buffer
from stretto.peer_buffer import CopyEngineBuffer
from stretto.world import Axis

PATIENCE = 20.0
"""Seconds."""


class Host:
    """The stream that computes: it is through with all that it was given."""

    def wait_event(self, event: threading.Event) -> None:
        assert event.wait(PATIENCE), "the stream of the messages is not so far"


class Stream:
    """That of the messages."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def give(self, work: Callable[[], object]) -> None:
        self._work.put(work)

    def record_event(self) -> threading.Event:
        event = threading.Event()
        self.give(event.set)
        return event

    def wait_stream(self, other: Host) -> None:
        """All is done there."""

    def _run(self) -> None:
        while True:
            self._work.get()()


class Driver:
    """`stretto.copy_engine.Driver` of such a stream, with a pause here and there."""

    def __init__(self, stream: Stream, rank: int) -> None:
        self._stream, self._random = stream, random.Random(rank)

    def write(self, address: int, number: int) -> None:
        self._give(setattr, ctypes.c_uint32.from_address(address), "value", number & 0xFFFFFFFF)

    def wait(self, address: int, number: int) -> None:
        flag = ctypes.c_int32.from_address(address)

        def until() -> None:
            while flag.value - number < 0:
                time.sleep(0)

        self._give(until)

    def copy(self, to: int, source: int, size: int) -> None:
        self._give(ctypes.memmove, to, source, size)

    def _give(self, work: Callable[..., object], *of: object) -> None:
        pause = self._random.random() * 4e-3 if self._random.random() < 0.2 else 0
        self._stream.give(lambda: (time.sleep(pause), work(*of)))


class Shared:
    """Stands for a handle of symmetric memory."""

    def __init__(self, files: list[Path], own: Tensor, axis: Axis) -> None:
        self._maps = [own if r == axis.rank else mapped(file) for r, file in enumerate(files)]
        self._group = axis.group
        self.buffer_ptrs = [each.data_ptr() for each in self._maps]

    def barrier(self) -> None:
        dist.barrier(self._group)


def mapped(file: Path) -> Tensor:
    with file.open("r+b") as opened:
        return torch.frombuffer(mmap.mmap(opened.fileno(), 0), dtype=torch.uint8)


@contextmanager
def buffer_over(axis: Axis, folder: Path, largest: int) -> Iterator[CopyEngineBuffer]:
    """One over the ranks of an axis, whose memory lies in files of a folder."""
    files = [folder / str(rank) for rank in range(axis.size)]

    def empty(size: int, **_: Any) -> Tensor:
        with files[axis.rank].open("wb") as opened:
            opened.truncate(size)
        return mapped(files[axis.rank])

    def rendezvous(own: Tensor, _: str) -> Shared:
        dist.barrier(axis.group)
        return Shared(files, own, axis)

    with (
        mock.patch.object(symmetric, "empty", empty),
        mock.patch.object(symmetric, "rendezvous", rendezvous),
        mock.patch.object(peer_buffer, "new_stream", side_effect=lambda _: Stream()),
        mock.patch.object(peer_buffer, "Driver", partial(Driver, rank=axis.rank)),
        mock.patch.object(torch.cuda, "current_stream", return_value=Host()),
    ):
        assert axis.group is not None
        made = CopyEngineBuffer(axis.group, torch.device("cpu"), largest)
        yield made
        made._stream.give(sys.exit)  # ends the thread
