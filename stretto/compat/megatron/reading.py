"""One value of a flag, read strictly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from stretto.arguments.setting import Value
from stretto.arguments.tree import settings
from stretto.arguments.values import from_text
from stretto.compat.megatron.bash import marks

Given = Mapping[str, Sequence[str]]
"""Flags with their values."""

Setting = tuple[str, Value, str]
"""Path, value, and the flags that say so."""

Rule = Callable[[Given], Iterator[Setting]]


class RejectedError(Exception):
    """Something that a flag asks for and that cannot be had."""


class UnfilledError(Exception):
    """A value that is not known: whoever read the script has said so."""


def value(g: Given, flag: str, path: str) -> Value:
    """The value of a flag, read as the setting's type."""
    try:
        return from_text(settings()[path], one(g, flag))
    except ValueError as error:
        raise RejectedError(flag, str(error)) from error


def one(g: Given, flag: str) -> str:
    """The one value of a flag, as it stands."""
    values = g[flag]
    if marks("".join(values)):
        raise UnfilledError(flag)
    if len(values) != 1:
        raise RejectedError(flag, f"takes one value, got {len(values)}")
    if "$" in values[0]:
        raise RejectedError(flag, f"the value of {values[0]} is not known here")
    return values[0]


def number(g: Given, flag: str) -> float:
    """A number from 0 on."""
    said = one(g, flag)
    try:
        found = float(said)
    except ValueError as error:
        raise RejectedError(flag, f"{said!r} is not a number") from error
    if not math.isfinite(found) or found < 0:
        raise RejectedError(flag, f"{said} is no finite number from 0 on")
    return found


def positive(g: Given, flag: str) -> int:
    """A whole number from 1 on."""
    found = number(g, flag)
    if found < 1 or found != int(found):
        raise RejectedError(flag, f"{one(g, flag)} is no whole number from 1 on")
    return int(found)
