"""The flags in the text of a launch script, without running it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

_ASSIGNMENT = re.compile(r"^\s*(?:export\s+)?(\w+)=(?!\()(.*)$")
_ARRAY = re.compile(r"^\s*\w+\+?=\(")
_VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}|\$\{(\w+)\}|\$(\w+)")


def words_of(text: str) -> list[list[str]]:
    """Every flag of the text with its values, one list each, in order.

    A flag and its values stand on one line (a backslash ends a line, too). Variables that the text itself sets
    are filled in; others stay as they are, `$NAME`.
    """
    variables: dict[str, str] = {}
    found: list[list[str]] = []
    for line in text.splitlines():
        if (assigned := _ASSIGNMENT.match(line)) and "--" not in assigned[2]:
            variables[assigned[1]] = _unquoted(_filled(assigned[2], variables))
            continue
        if "--" in line:
            found += flags_of(_split(_filled(_ARRAY.sub("", line), variables)))
    return found


def flags_of(words: Sequence[str]) -> list[list[str]]:
    """Every flag of a command line with its values, one list each; words before the first flag are left out."""
    found: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            found.append([flag, value] if equals else [flag])
        elif found and word not in ("\\", ")"):
            found[-1].append(word)
    return found


def _split(line: str) -> list[str]:
    """The words of a line; a quoted word that holds a flag and its value (as arrays have them) comes apart."""
    line = line.rstrip().rstrip("\\").rstrip().removesuffix(")")
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # a quote that another line closes
        words = line.split()
    return [part for word in words for part in (shlex.split(word) if word.startswith("--") and " " in word else [word])]


def _filled(text: str, variables: dict[str, str]) -> str:
    def value(m: re.Match[str]) -> str:
        name = m[1] or m[3] or m[4]
        return variables.get(name, _unquoted(m[2]) if m[2] is not None else m[0])

    return _VARIABLE.sub(value, text)


def _unquoted(text: str) -> str:
    return text.partition(" #")[0].strip().strip("\"'")
