"""Where a value comes from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class SourceKind(IntEnum):
    """Places that can set a value; the larger overrides the smaller."""

    DEFAULT = 0
    PRESET = 1
    MODEL = 2
    CHECKPOINT = 3
    FILE = 4
    ENVIRONMENT = 5
    COMMAND_LINE = 6

    DERIVED = -1  # computed from the others


@dataclass(frozen=True)
class Source:
    """A place and its name: a preset, a path, a variable, or the equation of a derived value."""

    kind: SourceKind
    name: str = ""

    @property
    def pinned(self) -> bool:
        """Whether a value from here is a fact of the surroundings, which no setting changes."""
        return self.kind is SourceKind.ENVIRONMENT

    def __str__(self) -> str:
        said = self.kind.name.lower().replace("_", " ")
        if self.kind is SourceKind.DERIVED:
            return f"{said}: {self.name}"
        return f"{said} {self.name}".rstrip()


DEFAULT = Source(SourceKind.DEFAULT)
COMMAND_LINE = Source(SourceKind.COMMAND_LINE)
