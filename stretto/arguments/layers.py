"""One source's settings, read and typed: what a preset, a checkpoint or a file says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from stretto.arguments.errors import ConfigError, Violation
from stretto.arguments.peers import flag_of
from stretto.arguments.schema import Arguments
from stretto.arguments.setting import Setting, Value
from stretto.arguments.sources import Source, SourceKind
from stretto.arguments.tree import build, paths, sections, settings
from stretto.arguments.values import from_data, nearest, repaired

_LONGEST = 80
"""Letters of a key that are repeated, and compared with what was perhaps meant."""

_MOST = 20
"""Wrong entries of one source that are told."""


@dataclass(frozen=True)
class Layer:
    """Values by path, as one source sets them.

    What it says wrongly is in `violations`; `wrong` has the settings that it gives no legal value for, each
    with the legal value nearest to what was meant.
    """

    source: Source
    values: Mapping[str, Value]
    violations: tuple[Violation, ...] = ()
    wrong: Mapping[str, Value] = field(default_factory=dict)


def read_layer(tree: Mapping[str, object], source: Source) -> Layer:
    """The layer of a nested table. Unknown keys and wrong types become violations."""
    values: dict[str, Value] = {}
    violations: list[Violation] = []
    wrong: dict[str, Value] = {}
    for path, raw in _entries(tree):
        if len(violations) == _MOST:
            violations.append(Violation("too_many", (), f"and more that is wrong in {source}"))
            break
        s = settings().get(path)
        if s is None:
            violations.append(unknown(path, source))
            continue
        try:
            values[path] = from_data(s, raw)
        except ValueError as error:
            violations.append(not_a_value(s, str(error), source))
            wrong[path] = repaired(s, raw)
    return Layer(source, values, tuple(violations), wrong)


def said_by(layers: Iterable[Layer]) -> dict[str, Value]:
    """What layers say together, the weakest first."""
    return {path: value for layer in layers for path, value in layer.values.items()}


def from_dict(tree: Mapping[str, object], *, name: str = "data") -> Arguments:
    """The arguments that `to_dict` gave. Settings that are missing take their defaults; rules are not applied.

    Raises:
        ConfigError: keys that are no settings, values of the wrong type or out of range: all of them.
    """
    layer = read_layer(tree, Source(SourceKind.CHECKPOINT, name))
    if layer.violations:
        raise ConfigError(layer.violations)
    return build(layer.values)


def unknown(path: str, source: Source) -> Violation:
    """A key that is no setting, with the one that was perhaps meant."""
    section, _, name = path.partition(".")
    guess = _guess(_short(section), _short(name))
    return Violation("unknown_setting", (path,), f"{_short(path)} ({source}) is no setting{guess}")


def _short(word: str) -> str:
    return word if len(word) <= _LONGEST else f"{word[:_LONGEST]}..."


def _guess(section: str, name: str) -> str:
    every = paths()
    if (name or section) not in every and (elsewhere := _elsewhere(name or section)) is not None:
        return elsewhere
    if section not in sections():
        meant = every.get(section) if not name else None
        near = meant or nearest(section, tuple(sections()))
        if near is None:
            return f"; the sections are {', '.join(sections())}"
        return f"; did you mean {near}?" if meant or not name else f"; did you mean {near}.{name}?"
    if not name:
        return f"; {section} is a table of settings"
    here = [s.name for s in settings().values() if s.section == section]
    meant = every.get(name) or every.get(nearest(name, here) or "")
    return f"; did you mean {meant}?" if meant else f"; {section} has {', '.join(here)}"


def _elsewhere(name: str) -> str | None:
    """What other programs call a setting, with its path in place of its flag."""
    by_flag = {s.flag: s.path for s in settings().values()}
    said = flag_of(name, by_flag)
    return said and re.sub(r"--[a-z0-9-]+(?=[ ?])", lambda flag: by_flag.get(flag[0], flag[0]), said)


def not_a_value(s: Setting, problem: str, source: Source) -> Violation:
    """A value of the wrong type, out of range or not among the choices."""
    return Violation("value", (s.path,), f"{f'{s.path} ({source})' if s.section else s.flag}: {problem}")


def _entries(tree: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for section, body in tree.items():
        if section in sections() and isinstance(body, Mapping):
            for name, raw in body.items():
                yield f"{section}.{name}", raw
        else:
            yield str(section), body
