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
        self.waited = False
        """Whether the device was not done when they were read: it has just finished, then."""
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
            self.waited = True
            self._event.synchronize()
        values: list[float] = self._values.tolist()
        return values


class LateReadback(Readback):
    """Of scalars that are not made yet: copied when they are read."""

    def __init__(self, *scalars: Tensor) -> None:
        self._scalars, self.waited = scalars, False

    def read(self) -> list[float]:
        """The figures; the host waits for all that was launched."""
        now = Readback(*self._scalars)
        values, self.waited = now.read(), now.waited
        return values
