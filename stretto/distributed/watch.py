"""Which gradient was no number first: of which parameter, in which microbatch of this rank."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

Seen = list[tuple[str, int, Tensor]]
"""Names, microbatches counted from 0, and whether all that was added up so far is finite []."""


class GradientWatch:
    """Looks at each gradient when a microbatch has added all of its part, before ranks sum them; the host never waits.

    It reads every gradient once more for each microbatch.
    """

    def __init__(self) -> None:
        self._seen: Seen = []
        self._times = Counter[str]()

    def __call__(self, name: str, grad: Tensor) -> None:
        """A backward has added all of its gradient of the parameter to `grad`."""
        self._seen.append((name, self._times[name], torch.isfinite(grad.detach()).all()))
        self._times[name] += 1

    def take(self) -> Seen:
        """What was seen in this step, which is over."""
        seen, self._seen = self._seen, []
        self._times.clear()
        return seen


def first_microbatch(seen: Seen) -> tuple[int, list[str]] | None:
    """The first microbatch with a gradient that is not finite, and the parameters; it reads the device."""
    flags = torch.stack([flag for *_, flag in seen]).tolist() if seen else []
    wrong = [(n, name) for (name, n, _), finite in zip(seen, flags, strict=True) if not finite]
    least = min((n for n, _ in wrong), default=None)
    return None if least is None else (least, sorted({name for n, name in wrong if n == least}))
