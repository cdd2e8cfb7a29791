"""Reading figures of the device without making it wait.

`tensor.tolist()` waits for everything that was launched before it. A `Readback` copies the figures to pinned host
memory as soon as they are made, and waits for that copy alone: read a step later, they arrived long ago, and the
device has the next step to work on meanwhile.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Readback:
    """Some numbers of one device, scalars or whole tensors one behind the other, on their way to the host."""

    def __init__(self, *scalars: Tensor) -> None:
        values = torch.cat([scalar.detach().double().flatten() for scalar in scalars])
        self._event: torch.cuda.Event | None = None
        self.ago: float | None = None
        """How many seconds before the host had read them the device had done what they are of: none where the host had
        to wait for it. None where the device was done before that."""
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._values = values

    def read(self) -> list[float]:
        """The figures; the host waits until the device has made them, and no longer."""
        if self._event is not None and not self._event.query():  # type: ignore[no-untyped-call]
            self.ago = 0.0
            self._event.synchronize()
        values: list[float] = self._values.tolist()
        return values


class LateReadback(Readback):
    """Of scalars that are not made yet: copied when they are read.

    The device is then done with the step that was launched meanwhile: its own clock says when it was with this one.
    """

    def __init__(self, *scalars: Tensor) -> None:
        self._scalars, self.ago = scalars, None
        self._made = self._now() if scalars[0].is_cuda else None

    def read(self) -> list[float]:
        """The figures; the host waits for all that was launched."""
        values = Readback(*self._scalars).read()
        if self._made is not None:
            now = self._now()
            now.synchronize()
            self.ago = self._made.elapsed_time(now) * 1e-3  # of milliseconds
        return values

    @staticmethod
    def _now() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
