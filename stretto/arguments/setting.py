"""`setting` declares one field of the schema; `Setting` is what everybody else reads about it."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

Value = (
    int
    | float
    | bool
    | str
    | tuple[int, ...]
    | tuple[float, ...]
    | tuple[str, ...]
    | tuple[tuple[str, int], ...]
    | None
)
"""What a field can hold; None means: derived, or not used. Pairs of a name and a number are a table in files."""

_METADATA = "stretto"

MOST_RANKS = 2**20
"""A larger number is a mistake, or a file that would exhaust its reader; so are sizes beyond other upper bounds."""


@dataclass(frozen=True)
class Bounds:
    """The range of a number (of each entry, for a list): above < x, at_least <= x, below < x, at_most <= x."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None

    def __contains__(self, x: float) -> bool:
        return (
            (self.above is None or x > self.above)
            and (self.at_least is None or x >= self.at_least)
            and (self.below is None or x < self.below)
            and (self.at_most is None or x <= self.at_most)
        )

    def __str__(self) -> str:
        said = [(">", self.above), (">=", self.at_least), ("<", self.below), ("<=", self.at_most)]
        return " and ".join(f"{sign} {_number(bound)}" for sign, bound in said if bound is not None)


def _number(x: float) -> str:
    return f"{x:,}" if isinstance(x, int) else f"{x:g}"


@dataclass(frozen=True)
class _Declared:
    help: str
    unit: str
    bounds: Bounds
    carried: bool
    path: bool
    repeats: bool


def setting(
    default: T,
    help: str,
    *,
    unit: str = "",
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    carried: bool = True,
    path: bool = False,
    repeats: bool = False,
) -> T:
    """A field of the schema: its default, its meaning in one sentence, its unit and its range.

    `carried` says whether a run that goes on from a checkpoint takes the value from there (where nothing
    stronger sets it); `path`, whether it may name a file or a directory; `repeats`, whether a list may name one thing
    more than once.
    """
    if unit == "ranks" and at_most is None:
        at_most = MOST_RANKS
    declared = _Declared(help, unit, Bounds(above, at_least, below, at_most), carried, path, repeats)
    return field(default=default, metadata={_METADATA: declared})


@dataclass(frozen=True)
class Setting:
    """One setting, as read from the schema.

    `kind` is int, float, bool, str, tuple (a list of `entry`, int, float or str) or dict (names with a number each);
    `choices` is empty unless the text, or each name, is one of a few.
    """

    section: str
    name: str
    kind: type
    entry: type
    optional: bool
    default: Value
    choices: tuple[str, ...]
    help: str
    unit: str
    bounds: Bounds
    carried: bool
    is_path: bool
    repeats: bool = False

    @property
    def path(self) -> str:
        """Section and name: `parallel.tp`."""
        return f"{self.section}.{self.name}"

    @property
    def flag(self) -> str:
        """How the command line says it: `--tp`."""
        return "--" + self.name.replace("_", "-")

    @property
    def also(self) -> str:
        """What else it may be called: the words before a colon in the help, `tensor_parallel`; or nothing."""
        name, colon, _ = self.help.partition(":")
        return name.replace(" ", "_") if colon and name.replace(" ", "").isalpha() else ""

    @property
    def takes(self) -> str:
        """What stands after the flag, in short: `N`, `X`, `TEXT`, `N,N,...` or the choices, if they are few."""
        if self.choices and self.kind is str:
            shown = "|".join(self.choices)
            return shown if len(shown) <= 50 else self.name.upper()
        lists = {int: "N,N,...", float: "X,X,...", str: "NAME,..."}
        return {int: "N", float: "X", str: "TEXT", tuple: lists[self.entry], dict: "NAME=N,...", bool: ""}[self.kind]


def settings_of(tree: type) -> Iterator[Setting]:
    """The settings of a dataclass whose fields are sections, in the order of their declaration."""
    sections = get_type_hints(tree)
    for section in fields(tree):
        cls = sections[section.name]
        hints = get_type_hints(cls)
        for f in fields(cls):
            yield _read(section.name, f, hints[f.name])


def _read(section: str, f: Field[Any], hint: Any) -> Setting:
    if _METADATA not in f.metadata or f.default is MISSING:
        raise TypeError(f"{section}.{f.name} must be declared with setting(default, help)")
    declared: _Declared = f.metadata[_METADATA]
    optional = False
    if get_origin(hint) in (Union, types.UnionType):
        arms = [arm for arm in get_args(hint) if arm is not type(None)]
        optional, (hint,) = len(arms) < len(get_args(hint)), arms
    kind = hint
    entry: type = int
    if get_origin(hint) is tuple:
        kind, hint = tuple, get_args(hint)[0]
        if get_origin(hint) is tuple:
            kind, (hint, _) = dict, get_args(hint)
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    if kind is tuple:
        entry = str if choices else hint
    elif choices and kind is not dict:
        kind = str
    if kind not in (int, float, bool, str, tuple, dict) or entry not in (int, float, str):
        raise TypeError(f"{section}.{f.name}: no way to read a {hint} from a command line")
    return Setting(
        section,
        f.name,
        kind,
        entry,
        optional,
        f.default,
        choices,
        declared.help,
        declared.unit,
        declared.bounds,
        declared.carried,
        declared.path,
        declared.repeats,
    )
