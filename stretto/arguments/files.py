"""Reading settings from files: TOML, YAML and the presets that come with the package."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from stretto.arguments.errors import Violation
from stretto.arguments.layers import Layer, read_layer
from stretto.arguments.sources import Source, SourceKind
from stretto.arguments.values import did_you_mean

_PRESETS = files("stretto.arguments") / "presets"


def presets() -> tuple[str, ...]:
    """Names of the presets."""
    return tuple(sorted(f.name.removesuffix(".toml") for f in _PRESETS.iterdir() if f.name.endswith(".toml")))


def preset_text(name: str) -> str:
    """The TOML of a preset."""
    return (_PRESETS / f"{name}.toml").read_text(encoding="utf-8")


def read_preset(name: str) -> Layer:
    """The settings of a preset."""
    source = Source(SourceKind.PRESET, name)
    if name not in presets():
        guess = did_you_mean(name, presets()) or f"; there are {', '.join(presets())}"
        return Layer(source, {}, (Violation("preset", (), f"there is no preset {name!r}{guess}"),))
    return read_layer(tomllib.loads(preset_text(name)), source)


def read_config(name: str) -> Layer:
    """The settings of a TOML or YAML file."""
    path, source = Path(name), Source(SourceKind.FILE, name)
    readers: dict[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".yaml": _load_yaml, ".yml": _load_yaml}
    if path.suffix not in readers:
        return _unreadable(source, f"its name must end in {', '.join(readers)}")
    try:
        tree = readers[path.suffix](path.read_text(encoding="utf-8"))
    except OSError as error:
        return _unreadable(source, error.strerror or str(error))
    except ValueError as error:  # TOML syntax, YAML syntax, no UTF-8
        return _unreadable(source, str(error))
    if tree is None:
        tree = {}
    if not isinstance(tree, Mapping):
        return _unreadable(source, "its top level must be a table of sections")
    return read_layer(tree, source)


def _unreadable(source: Source, problem: str) -> Layer:
    return Layer(source, {}, (Violation("config_file", (), f"cannot read {source.name}: {problem}"),))


def _load_yaml(text: str) -> Any:
    """YAML with the numbers and booleans of YAML 1.2: `1e-3` is a number, `no` and `on` are text.

    Raises ValueError on wrong syntax and on a key that stands twice.
    """
    import yaml  # only who writes YAML waits for it

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {}  # noqa: RUF012

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise ValueError(f"the key {twice[0]!r} stands twice")
            return super().construct_mapping(node, deep)

    core = [
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"[-+]?[0-9]+", list("-+0123456789")),
        ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ]
    for tag, pattern, first in core:
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), first)
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
