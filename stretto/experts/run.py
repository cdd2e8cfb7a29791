"""A sparse layer that can be left while its messages are under way, so that other tokens are computed meanwhile."""

from __future__ import annotations

from collections.abc import Generator
from enum import Enum, auto
from typing import NamedTuple

from torch import Tensor


class Stop(Enum):
    """Where a layer can be left, in this order."""

    SORTED = auto()
    """The rows that are to be sent lie ready."""
    ASKED = auto()
    """Ranks tell each other how many come."""
    SENT = auto()
    """The rows are on their way; the host waited for their numbers."""
    COMPUTED = auto()
    """The experts are through with them."""
    GIVEN = auto()
    """The outputs are on their way."""


class Pause(NamedTuple):
    """Where a layer was left, and what was put out last before."""

    stop: Stop
    passed: Tensor


Run = Generator[Pause, None, Tensor]


def finish(run: Run) -> Tensor:
    """What a run returns, without leaving it."""
    while True:
        try:
            next(run)
        except StopIteration as end:
            y: Tensor = end.value
            return y
