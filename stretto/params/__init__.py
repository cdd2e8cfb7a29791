"""The sharding spec of each parameter, stated once: `declare` it, `collect` all, `fill` them, take their `slices`."""

from stretto.params.checksum import checksum, read_together
from stretto.params.declare import collect, declare, declared_in
from stretto.params.spec import Block, Declared, Init, Logical, ParamSpec, Part, Shard, Slice
from stretto.params.values import fill, slices

__all__ = [
    "Block",
    "Declared",
    "Init",
    "Logical",
    "ParamSpec",
    "Part",
    "Shard",
    "Slice",
    "checksum",
    "collect",
    "declare",
    "declared_in",
    "fill",
    "read_together",
    "slices",
]
