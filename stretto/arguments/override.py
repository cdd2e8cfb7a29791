"""`Override`: a setting that gives way to another, or has no effect beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from stretto.arguments.schema import Arguments
from stretto.arguments.setting import Value
from stretto.arguments.tree import get, settings

Equation = Callable[[Arguments], tuple[Value, str] | None]
"""The value and how it came about, or None where it does not apply."""


@dataclass(frozen=True)
class Override:
    """A setting that gives way where a stronger source sets one of `to` to something it does not go with.

    `--tp 1` over a preset with sequence parallelism means: without. Where the setting is said by a source
    at least as strong as those, it is wrong instead: `ineffective` says that it then has no effect; for the
    others a rule of `rules.py` has the words.
    """

    path: str
    to: tuple[str, ...]
    equation: Equation
    ineffective: bool = False


def unused(
    section: str, names: str, on: str, when: Callable[[Arguments], bool], reason: str | Callable[[Arguments], str]
) -> Iterator[Override]:
    """Settings of a section, by name, that have no effect where `when` holds, which depends on the settings `on`."""
    for path in (f"{section}.{name}" for name in names.split()):

        def equation(a: Arguments, path: str = path) -> tuple[Value, str] | None:
            default = settings()[path].default
            return (
                (default, reason if isinstance(reason, str) else reason(a))
                if when(a) and get(a, path) != default
                else None
            )

        yield Override(path, tuple(on.split()), equation, ineffective=True)
