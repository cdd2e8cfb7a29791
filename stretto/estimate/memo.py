"""What was computed before, for whoever asks about many runs that differ little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Memo:
    """Results of pure functions by their arguments, which can be hashed. Whoever makes one hands it down."""

    def __init__(self) -> None:
        self._found: dict[object, Any] = {}

    def __call__(self, of: Callable[[*Ts], T], *args: *Ts) -> T:
        """`of(*args)`, computed once."""
        key = of, args
        try:
            found: T = self._found[key]
        except KeyError:
            found = self._found[key] = of(*args)
        return found
