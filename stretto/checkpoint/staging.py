"""A copy of what this rank writes, in memory that it shares with its writer process.

On a CPU it is made at once. From a GPU the copies go on a stream of their own into pinned memory, beside the next
forward and backward, which change no weight; the optimizer's next update waits on the device for them.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from stretto.checkpoint.errors import CheckpointError
from stretto.checkpoint.part import Owned

ALIGNED: Final = 4096


class Staging:
    """Room for pieces that are the same at each save."""

    fd = -1
    _pinned: Tensor | None = None

    def __init__(self, pieces: Sequence[Owned], device: torch.device) -> None:
        """Take the memory, all of it now. Raises CheckpointError where there is not as much."""
        self.pieces, places, at = tuple(pieces), [], 0
        for piece in pieces:
            places.append(at)
            at += piece.nbytes + -piece.nbytes % ALIGNED
        self.places, self.nbytes = tuple(places), at
        self.fd = _shared(max(at, 1))
        self._memory = mmap.mmap(self.fd, max(at, 1))
        whole = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._views = [
            whole[start : start + p.nbytes].view(getattr(torch, p.dtype)).view(p.sizes) if p.nbytes else None
            for p, start in zip(self.pieces, places, strict=True)
        ]
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None
        if device.type == "cuda":
            status = torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), whole.numel(), 0)  # type: ignore[no-untyped-call]
            if int(status) != 0:
                raise CheckpointError(f"{at:,} bytes of host memory cannot be pinned (CUDA error {int(status)})")
            self._pinned = whole
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, tensors: Sequence[Tensor]) -> None:
        """Begin to copy the values that the tensors have now, in the order of the current stream."""
        with torch.no_grad():
            if self._stream is None:
                self._copy(tensors)
                return
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                self._copy(tensors)
                self._copied = self._stream.record_event()

    def _copy(self, tensors: Sequence[Tensor]) -> None:
        for view, tensor in zip(self._views, tensors, strict=True):
            if view is not None:
                view.copy_(tensor, non_blocking=True)

    @property
    def done(self) -> bool:
        """Whether all that was begun is here."""
        return self._copied is None or bool(self._copied.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """The host waits for it."""
        if self._copied is not None:
            self._copied.synchronize()

    def before_update(self) -> None:
        """What the current stream does from now on comes after it: weights may change then."""
        if self._copied is not None and not self.done:
            torch.cuda.current_stream().wait_event(self._copied)

    def close(self) -> None:
        """Close the descriptor; the memory goes with the last process that has it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self._pinned is not None:
            self.wait()
            torch.cuda.cudart().cudaHostUnregister(self._pinned.data_ptr())  # type: ignore[no-untyped-call]
            self._pinned = None

    def __del__(self) -> None:
        self.close()


def _shared(nbytes: int) -> int:
    """A descriptor of memory without a name: it is gone with its last user, however that ends."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("stretto-checkpoint")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    try:
        os.ftruncate(fd, nbytes)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, nbytes)  # all pages are there before the first save
    except OSError as error:
        os.close(fd)
        raise CheckpointError(
            f"an asynchronous save needs {nbytes:,} bytes of memory for a copy of what this rank writes "
            f"({error.strerror}): save without, --no-async-save"
        ) from error
    return fd
