"""Streams of a GPU beside the one that computes; on a CPU, which does one thing after the other, there are none."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from stretto.world import Done, Work


@dataclass(frozen=True)
class Stream:
    """A stream of a GPU; None: whatever is current, as on a CPU."""

    stream: torch.cuda.Stream | None = None

    @classmethod
    def of(cls, device: torch.device) -> Stream:
        """One of torch's pool, which has 32."""
        return cls(torch.cuda.Stream(device) if device.type == "cuda" else None)  # type: ignore[no-untyped-call]

    @classmethod
    def current(cls, device: torch.device) -> Stream:
        """That of the computation."""
        return cls(torch.cuda.current_stream(device) if device.type == "cuda" else None)

    def used(self) -> AbstractContextManager[object]:
        """Within, what is launched is launched here, and what is allocated is from the memory of this stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def follows(self, other: Stream) -> None:
        """What is launched from now on comes after what the other has so far."""
        if self.stream is not None and other.stream is not None:
            self.stream.wait_stream(other.stream)

    def launched(self) -> Work:
        """What has been launched so far."""
        return Done() if self.stream is None else _Launched(self.stream.record_event())

    def hand_over(self, x: Tensor) -> Tensor:
        """x, which was allocated here, to the current stream: its memory is not given away before that is through."""
        if self.stream is not None:
            x.record_stream(torch.cuda.current_stream(x.device))
        return x

    def synchronize(self) -> None:
        """The host waits."""
        if self.stream is not None:
            self.stream.synchronize()


@dataclass(frozen=True)
class _Launched:
    """Work up to an event of another stream of the device."""

    event: torch.cuda.Event

    def wait(self) -> None:
        """What follows on the current stream comes after it."""
        torch.cuda.current_stream().wait_event(self.event)

    def is_completed(self) -> bool:
        """Whether it is over."""
        return bool(self.event.query())  # type: ignore[no-untyped-call]
