"""Arguments from plain nested data, rejecting what the schema does not know."""

from __future__ import annotations

from collections.abc import Mapping

from stretto.arguments.errors import ConfigError
from stretto.arguments.layers import read_layer
from stretto.arguments.schema import Arguments
from stretto.arguments.sources import Source, SourceKind
from stretto.arguments.tree import build


def from_dict(tree: Mapping[str, object], *, name: str = "data") -> Arguments:
    """The arguments that `to_dict` gave. Settings that are missing take their defaults; rules are not applied.

    Raises:
        ConfigError: keys that are no settings, values of the wrong type or out of range: all of them.
    """
    layer = read_layer(tree, Source(SourceKind.CHECKPOINT, name))
    if layer.violations:
        raise ConfigError(layer.violations)
    return build(layer.values)
