"""`setting` declares one field: of the settings of a run, or of the options of a command; all else reads `Setting`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from operator import ge, gt, le, lt
from types import MappingProxyType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

Entries = tuple[int, ...] | tuple[float, ...] | tuple[str, ...] | tuple[tuple[str, int], ...]
Value = int | float | bool | str | Entries | None
"""What a field can hold; None means: derived, or not used. Pairs of a name and a number are a table in files."""

_METADATA = "stretto"

MOST_RANKS = 2**20
"""A larger number is a mistake, or a file that would exhaust its reader; so are sizes beyond other upper bounds."""

REQUIRED: Any = object()
"""In place of a default: the option must be said."""


_SIGNS = MappingProxyType({"above": (">", gt), "at_least": (">=", ge), "below": ("<", lt), "at_most": ("<=", le)})


@dataclass(frozen=True)
class Bounds:
    """The range of a number (of each entry, for a list): above < x, at_least <= x, below < x, at_most <= x."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None

    def given(self) -> dict[str, float]:
        """Those that there are, by name."""
        return {name: bound for name in _SIGNS if (bound := getattr(self, name)) is not None}

    def __contains__(self, x: float) -> bool:
        return all(_SIGNS[name][1](x, bound) for name, bound in self.given().items())

    def __str__(self) -> str:
        numbers = {name: f"{x:,}" if isinstance(x, int) else f"{x:g}" for name, x in self.given().items()}
        return " and ".join(f"{_SIGNS[name][0]} {number}" for name, number in numbers.items())


@dataclass(frozen=True)
class Setting:
    """One setting: what its field declares, and what its type says.

    `kind` is int, float, bool, str, tuple (a list of `entry`, int, float or str) or dict (names with a number each);
    `choices` is empty unless the text, or each name, is one of a few. Options of a command have no section.
    """

    help: str
    unit: str = ""
    bounds: Bounds = Bounds()
    carried: bool = True
    is_path: bool = False
    repeats: bool = False
    positional: bool = False
    named: str = ""
    section: str = ""
    name: str = ""
    kind: type = str
    entry: type = int
    optional: bool = False
    required: bool = False
    default: Value = None
    choices: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """Section and name: `parallel.tp`; of an option its name."""
        return f"{self.section}.{self.name}" if self.section else self.name

    @property
    def flag(self) -> str:
        """How the command line says it: `--tp`; of a word without a flag its name."""
        return self.name.upper() if self.positional else "--" + self.name.replace("_", "-")

    @property
    def words(self) -> bool:
        """Whether it is a list with a word for each entry, so that its flag may stand there more than once."""
        return self.kind is tuple and self.entry is str and not self.section

    @property
    def takes(self) -> str:
        """What stands after the flag, in short: `N`, `X`, `TEXT`, `PATH`, `N,N,...` or the choices, if they are few."""
        if self.named:
            return self.named
        if self.choices and self.kind is str:
            shown = "|".join(self.choices)
            return shown if len(shown) <= 50 else self.name.upper()
        lists = {int: "N,N,...", float: "X,X,...", str: "TEXT" if self.words else "NAME,..."}
        text = "PATH" if self.is_path else "TEXT"
        return {int: "N", float: "X", str: text, tuple: lists[self.entry], dict: "NAME=N,...", bool: ""}[self.kind]


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
    positional: bool = False,
    named: str = "",
) -> T:
    """A field of the schema: its default or REQUIRED, its meaning in one sentence, unit and range.

    `carried` says whether a run that goes on from a checkpoint takes the value from there (where nothing
    stronger sets it); `path`, whether it may name a file or a directory; `repeats`, whether a list may name one thing
    more than once; `positional`, whether it is a word without a flag; `named`, what the help calls its value.
    """
    if unit == "ranks" and at_most is None:
        at_most = MOST_RANKS
    bounds = Bounds(above, at_least, below, at_most)
    declared = {_METADATA: Setting(help, unit, bounds, carried, path, repeats, positional, named)}
    made: T = field(metadata=declared) if default is REQUIRED else field(default=default, metadata=declared)
    return made


def local_setting(default: T, help: str, **declared: Any) -> T:
    """The same of one that a run that goes on from a checkpoint does not take from there."""
    return setting(default, help, carried=False, **declared)


def settings_of(tree: type) -> Iterator[Setting]:
    """The settings of a dataclass whose fields are sections, in the order of their declaration."""
    sections = get_type_hints(tree)
    for section in fields(tree):
        yield from settings_in(sections[section.name], section.name)


def settings_in(cls: type, section: str = "") -> Iterator[Setting]:
    """The settings that the fields of one dataclass are; those of a command's options have no section."""
    hints = get_type_hints(cls)
    for f in fields(cls):
        if section or _METADATA in f.metadata:
            yield _read(section, f, hints[f.name])


def _read(section: str, f: Field[Any], hint: Any) -> Setting:
    if _METADATA not in f.metadata or (section and f.default is MISSING):
        raise TypeError(f"{section}.{f.name} must be declared with setting(default, help)")
    optional = get_origin(hint) in (Union, UnionType)
    of = next(arm for arm in get_args(hint) if arm is not type(None)) if optional else hint
    each = get_args(of)[0] if get_origin(of) is tuple else of
    word = get_args(each)[0] if get_origin(each) is tuple else each
    choices = get_args(word) if get_origin(word) is Literal else ()
    plain = str if choices else word
    kind = dict if word is not each else tuple if each is not of else plain
    if plain not in (int, float, bool, str) or (kind is tuple and plain is bool):
        raise TypeError(f"{section}.{f.name}: no way to read a {hint} from a command line")
    made: Setting = replace(
        f.metadata[_METADATA],
        section=section,
        name=f.name,
        kind=kind,
        entry=plain if kind is tuple else int,
        optional=optional,
        choices=choices,
        required=f.default is MISSING,
        default=None if f.default is MISSING else f.default,
    )
    return made
