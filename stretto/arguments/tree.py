"""The tree of arguments as a table of dotted paths, and back."""

from __future__ import annotations

from collections.abc import Mapping
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
    tree: dict[str, dict[str, Any]] = {f.name: {} for f in fields(Arguments)}
    for path, s in settings().items():
        value = get(args, path)
        tree[s.section][s.name] = _plain(s, value)
    return tree


def _plain(s: Setting, value: Value) -> object:
    if not isinstance(value, tuple):
        return value
    return dict(cast("tuple[tuple[str, int], ...]", value)) if s.kind is dict else list(value)
