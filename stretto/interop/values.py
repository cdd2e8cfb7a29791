"""Single values of a `config.json`, held against what they may be; what is not goes to `wrong`, by its name."""

from __future__ import annotations

import math
from typing import Any, Final

ANY: Final = 1 << 20
"""Sizes beyond these are no model's: who asks for memory by them would get none."""


def number(name: str, value: Any, wrong: list[str]) -> float:
    """A finite number above 0."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not usable or not 0 < value < 1e9 or not math.isfinite(value):
        wrong.append(f"{name} = {value!r:.60}: must be a number above 0")
        return 1.0
    return float(value)


def layers(name: str, value: Any, wrong: list[str]) -> tuple[int, ...]:
    """Numbers of layers, counted from 0."""
    usable = isinstance(value, list) and len(value) <= ANY
    if not usable or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in value):
        wrong.append(f"{name} = {value!r:.60}: must be a list of layers, counted from 0")
        return ()
    return tuple(value)


def switch(name: str, value: Any, wrong: list[str], default: bool) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        wrong.append(f"{name} = {value!r:.60}: must be true or false")
        return default
    return value
