"""The tree of arguments as a table of dotted paths, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from functools import cache
from types import MappingProxyType
from typing import Any, cast, get_type_hints

from stretto.arguments.schema import Arguments
from stretto.arguments.setting import Setting, Value, settings_of


@cache
def settings() -> Mapping[str, Setting]:
    """Every setting by its path, in the order of the schema."""
    return MappingProxyType({s.path: s for s in settings_of(Arguments)})


@cache
def paths() -> Mapping[str, str]:
    """The path of every setting by its name, which no other has."""
    tree = Arguments()
    return {f.name: f"{section.name}.{f.name}" for section in fields(tree) for f in fields(getattr(tree, section.name))}


@cache
def sections() -> Mapping[str, type]:
    """The dataclass of each section."""
    return MappingProxyType(get_type_hints(Arguments))


def by_section() -> Iterator[tuple[str, str, list[Setting]]]:
    """Each section: its name, what it is about, and its settings."""
    for name, section in sections().items():
        yield name, (section.__doc__ or "").strip(), [s for s in settings().values() if s.section == name]


def get(args: Arguments, path: str) -> Value:
    """The value at a dotted path."""
    section, _, name = path.partition(".")
    return cast(Value, getattr(getattr(args, section), name))


def put(args: Arguments, path: str, value: Value) -> Arguments:
    """The arguments with one value changed."""
    section, _, name = path.partition(".")
    return replace(args, **{section: replace(getattr(args, section), **{name: value})})


def build(values: Mapping[str, Value]) -> Arguments:
    """Arguments with these values, and defaults elsewhere."""
    tree: dict[str, dict[str, Any]] = {section: {} for section in sections()}
    for path, value in values.items():
        section, _, name = path.partition(".")
        tree[section][name] = value
    return Arguments(**{section: cls(**tree[section]) for section, cls in sections().items()})


def to_dict(args: Arguments) -> dict[str, dict[str, Any]]:
    """The arguments as plain nested data, for checkpoints: lists and tables for tuples, every setting named."""
    return {name: {s.name: _plain(s, get(args, s.path)) for s in of_it} for name, _, of_it in by_section()}


def _plain(s: Setting, value: Value) -> object:
    if not isinstance(value, tuple):
        return value
    return dict(cast("tuple[tuple[str, int], ...]", value)) if s.kind is dict else list(value)
