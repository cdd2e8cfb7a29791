"""What a stream is told to do without a kernel: copy between GPUs, write a flag, wait for one.

Copy engines do it, and neither the host nor a multiprocessor takes part.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

LEAST: Final = 2**18
"""Bytes; what is less is at its peer sooner through NCCL."""
ALIGNMENT: Final = 512
"""Of what lies in memory that other GPUs read, in bytes."""


class Arrival:
    """The work of a message; `then` is what is to be done with what has come, and `keep` what must live until then."""

    def __init__(self, event: torch.cuda.Event, keep: object, then: Callable[[], None] | None = None) -> None:
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


_AT_LEAST, _ANY_BIT = 0, 2
"""CU_STREAM_WAIT_VALUE_GEQ and CU_STREAM_WAIT_VALUE_AND."""


class Driver:
    """What a stream is told by CUDA's driver itself; addresses are those of the device. Raises RuntimeError."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream.cuda_stream
        library = ctypes.CDLL("libcuda.so.1")
        number = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint)
        self._write = _function(library, "cuStreamWriteValue32_v2", *number)
        self._wait = _function(library, "cuStreamWaitValue32_v2", *number)
        sizes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)
        self._copy = _function(library, "cuMemcpyDtoDAsync_v2", *sizes)

    def write(self, address: int, number: int) -> None:
        """Write 32 bits when all before is done."""
        _checked(self._write, self._stream, address, number & 0xFFFFFFFF, 0)

    def wait(self, address: int, number: int) -> None:
        """Do nothing more until there is at least this number, as numbers that wrap are compared."""
        _checked(self._wait, self._stream, address, number & 0xFFFFFFFF, _AT_LEAST)

    def wait_bit(self, address: int, bit: int) -> None:
        """Do nothing more until this bit is there."""
        _checked(self._wait, self._stream, address, bit, _ANY_BIT)

    def copy(self, to: int, source: int, size: int) -> None:
        """Copy so many bytes."""
        _checked(self._copy, to, source, size, self._stream)


def _function(library: ctypes.CDLL, name: str, *arguments: Any) -> Any:
    function = getattr(library, name)
    function.argtypes, function.restype = arguments, ctypes.c_int
    return function


def _checked(function: Any, *arguments: int) -> None:
    if code := function(*arguments):
        raise RuntimeError(f"{function.__name__} failed with CUDA error {code}")


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """One of high priority: its queue on the device is not that of the streams that compute."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


def shared_memory(
    group: ProcessGroup, device: torch.device, numel: int, dtype: torch.dtype
) -> tuple[Tensor, list[int]]:
    """Memory [numel] of 0 that the ranks of `group` read of each other, and where it is at each; all make it together,
    and torch's allocator knows nothing of it."""
    import torch.distributed._symmetric_memory as symmetric

    memory = symmetric.empty(numel, dtype=dtype, device=device).zero_()
    handle = symmetric.rendezvous(memory, group.group_name)
    handle.barrier()  # nobody's flags are written before they are zero
    within = memory.data_ptr() - int(handle.buffer_ptrs[group.rank()])
    return memory, [int(pointer) + within for pointer in handle.buffer_ptrs]
