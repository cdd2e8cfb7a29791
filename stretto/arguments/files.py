"""Reading settings from files: TOML, YAML and the presets that come with the package."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from stretto.arguments.errors import Violation
from stretto.arguments.layers import Layer, read_layer
from stretto.arguments.sources import Source, SourceKind
from stretto.arguments.values import did_you_mean
from stretto.reading import DEEPEST, read_text, shallow, shown, too_deep

_PRESETS = files("stretto.arguments") / "presets"

LARGEST = 2**17
"""Bytes of a file of settings: twenty times what all settings take."""

_MOST_DOTS = 1000


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
    readers: dict[str, Callable[[str], Any]] = {".toml": _load_toml, ".yaml": _load_yaml, ".yml": _load_yaml}
    if path.suffix not in readers:
        return _unreadable(source, f"its name must end in {', '.join(readers)}")
    try:
        tree = shallow(readers[path.suffix](read_text(path, LARGEST)))
    except RecursionError:
        return _unreadable(source, too_deep())
    except ValueError as error:  # no such file, no UTF-8, TOML syntax, YAML syntax
        return _unreadable(source, shown_line(str(error)))
    if tree is None:
        tree = {}
    if not isinstance(tree, Mapping):
        return _unreadable(source, "its top level must be a table of sections")
    return read_layer(tree, source)


def shown_line(text: str, longest: int = 300) -> str:
    """A parser's message, which may repeat what it could not read."""
    return text if len(text) <= longest else f"{text[:longest]} ..."


def _unreadable(source: Source, problem: str) -> Layer:
    return Layer(source, {}, (Violation("config_file", (), f"cannot read {source.name}: {problem}"),))


def _load_toml(text: str) -> Any:
    """TOML. A key of n parts costs the library n^2, so one of thousands is not shown to it."""
    if any(line.count(".") > _MOST_DOTS for line in text.split("\n")):
        raise ValueError(f"a line has more than {_MOST_DOTS:,} dots: keys are nested too deeply")
    return tomllib.loads(text)


def _load_yaml(text: str) -> Any:
    """YAML with the numbers and booleans of YAML 1.2: `1e-3` is a number, `no` and `on` are text.

    Raises ValueError on wrong syntax, on a key that stands twice, and on an alias of a list or table: nine of them in
    nine of them, and so on, are a file of a page that stands for more than memory holds.
    """
    import yaml  # only who writes YAML waits for it

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {}  # noqa: RUF012

        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            alias = self.check_event(yaml.AliasEvent)
            self.depth = getattr(self, "depth", 0) + 1
            if self.depth > DEEPEST:
                raise ValueError(too_deep())
            node: yaml.Node | None = super().compose_node(parent, index)
            self.depth -= 1
            if alias and not isinstance(node, yaml.ScalarNode):
                raise ValueError("an alias (*name) stands for a list or a table: write it out")
            return node

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            if twice := [key for key, n in Counter(map(str, keys)).items() if n > 1]:
                raise ValueError(f"the key {shown(twice[0])} stands twice")
            return super().construct_mapping(node, deep)

    core = [
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"[-+]?[0-9]+", list("-+0123456789")),
        ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ]
    for tag, pattern, first in core:
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), first)
    # The library's own reads numbers of YAML 1.1, in which 010 is 8.
    Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
