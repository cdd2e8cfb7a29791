"""Which suggested sizes a person would choose too: those that hardware is fast with, on a layout that makes sense."""

from __future__ import annotations

from collections.abc import Mapping

from stretto.arguments.nearby import granule
from stretto.arguments.schema import Arguments
from stretto.arguments.setting import Value
from stretto.arguments.tree import get

_SIZES = frozenset({"model.hidden", "model.ffn", "model.vocab", "model.head_dim", "batch.seq_len"})
_GPUS_PER_NODE = 8


def is_sensible(change: Mapping[str, Value], args: Arguments, gpus_per_node: Value) -> bool:
    """Whether the changed sizes are round, no stage is left without a layer, and tp stays within a node.

    Only what changes is looked at: odd sizes that the user has chosen are the user's business.
    """
    sizes = [value for path, value in change.items() if path in _SIZES and isinstance(value, int)]
    if any(value % granule(value) for value in sizes):
        return False
    if _number(change.get("parallel.tp")) > (_number(gpus_per_node) or _GPUS_PER_NODE):
        return False
    if not {"parallel.pp", "model.layers"} & change.keys():
        return True
    pp, layers = (_number(change.get(path, get(args, path))) for path in ("parallel.pp", "model.layers"))
    return pp <= layers


def _number(value: Value) -> int:
    return value if isinstance(value, int) else 0
