"""Context parallelism, from Megatron-LM's flags."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final

from stretto.compat.megatron.given import Given, RejectedError, Setting, positive

COMM, LEVELS, SIZE = "--cp-comm-type", "--hierarchical-context-parallel-sizes", "--context-parallel-size"

_WAYS: Final[Mapping[str, str]] = MappingProxyType(
    {"p2p": "ring", "all_gather": "all-gather", "allgather": "all-gather", "a2a": "ulysses", "a2a+p2p": "hybrid"}
)


def context(g: Given) -> Iterator[Setting]:
    """How ranks communicate, of all layers or of each; by itself Megatron-LM's is a ring."""
    if SIZE not in g or (cp := positive(g, SIZE)) == 1:  # over one rank neither is read
        return
    said = g.get(COMM, ["p2p"])
    if unknown := [word for word in said if word not in _WAYS]:
        raise RejectedError(COMM, f"{', '.join(unknown)}: not available; there is {', '.join(_WAYS)}")
    yield "parallel.cp_comm", tuple(_WAYS[word] for word in said), COMM if COMM in g else f"no {COMM}"
    if "a2a+p2p" not in said:
        return
    sizes = g.get(LEVELS, [])
    if len(sizes) != 2 or not all(word.isdecimal() for word in sizes) or int(sizes[0]) * int(sizes[1]) != cp:
        raise RejectedError(
            LEVELS, f"{' '.join(sizes) or 'missing'}: a2a+p2p needs two sizes whose product is {SIZE} {cp}"
        )
    yield "parallel.cp_a2a", int(sizes[0]), LEVELS
