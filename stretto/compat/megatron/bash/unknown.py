"""What is not known without running a script: a mark in a text, and what is to be said of it."""

from __future__ import annotations

from dataclasses import dataclass, field

_FIRST = 0xF0000
"""Marks are letters of a plane that Unicode leaves to private use."""
_MOST = 0xFFFD


@dataclass(frozen=True)
class Unknown:
    """An expansion that cannot be filled in: how it is written, its line, why, and the variable that would fill it."""

    text: str
    line: int
    why: str
    name: str = ""

    def __str__(self) -> str:
        way = f": say --set {self.name}=VALUE" if self.name else ""
        return f"{self.text} (line {self.line}): {self.why}{way}"


@dataclass
class Unknowns:
    """All that are met in one reading."""

    all: list[Unknown] = field(default_factory=list)

    def mark(self, unknown: Unknown) -> str:
        """The letter that stands for it."""
        if unknown not in self.all:
            if len(self.all) > _MOST:
                raise ValueError("too much of the script is not known")
            self.all.append(unknown)
        return chr(_FIRST + self.all.index(unknown))

    def shown(self, text: str) -> str:
        """A text with what is not known of it as the script writes it."""
        return "".join(self.all[ord(c) - _FIRST].text if is_mark(c) else c for c in text)

    def of(self, text: str) -> list[Unknown]:
        """What is not known of a text."""
        return [self.all[ord(c) - _FIRST] for c in dict.fromkeys(text) if is_mark(c)]


def is_mark(c: str) -> bool:
    """Whether a letter stands for something unknown."""
    return _FIRST <= ord(c) <= _FIRST + _MOST


def marks(text: str) -> str:
    """The marks in a text, each once."""
    return "".join(c for c in dict.fromkeys(text) if is_mark(c))
