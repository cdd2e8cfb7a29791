"""Parameter groups: what the update does otherwise for parameters, by patterns over their logical names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Final


@dataclass(frozen=True)
class ParamGroup:
    """Parameters whose logical name fits `pattern`, as in a shell, with `|` between alternatives; what is None stays.

    Where several groups hold a parameter, the last that says something of it decides.
    """

    pattern: str
    weight_decay: float | None = None
    lr: float | None = None
    """Multiplies the learning rate."""

    def holds(self, name: str) -> bool:
        """Whether the parameter of this logical name is in it."""
        return any(fnmatchcase(name, each.strip()) for each in self.pattern.split("|"))


NUMBERS: Final = tuple(each.name for each in fields(ParamGroup) if each.name != "pattern")


def parse_groups(text: str) -> tuple[ParamGroup, ...]:
    """`*norm*|*.bias: weight_decay=0; *embed*: lr=0.5`. Raises ValueError where it says something else."""
    return tuple(_group(each) for each in text.split(";") if each.strip())


def unmatched(groups: Sequence[ParamGroup], names: Iterable[str]) -> list[str]:
    """The patterns that fit none of the names."""
    known = list(names)
    return [group.pattern for group in groups if not any(map(group.holds, known))]


def _group(text: str) -> ParamGroup:
    pattern, colon, said = text.rpartition(":")
    numbers: dict[str, float] = {}
    if not colon or not pattern.strip() or not all(each.strip() for each in pattern.split("|")):
        raise ValueError(f"{text.strip()!r} is no group: write PATTERN: {'=X or PATTERN: '.join(NUMBERS)}=X")
    for each in said.split(","):
        name, _, value = (word.strip() for word in each.partition("="))
        if name not in NUMBERS or name in numbers:
            raise ValueError(f"{each.strip()!r} in {text.strip()!r}: a group has {' and '.join(NUMBERS)}, each once")
        try:
            numbers[name] = float(value)
        except ValueError:
            numbers[name] = math.nan
        if not 0 <= numbers[name] < math.inf:
            raise ValueError(f"{name} = {value or 'nothing'} in {text.strip()!r}: must be a number >= 0")
    return ParamGroup(pattern.strip(), **numbers)
