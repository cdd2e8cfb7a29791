"""Whether the state of a run is still sound: replicas equal to the last bit, every number finite.

All ranks call these together and learn the same. A comparison moves two numbers over each axis where replicas agree;
checksums travel only where they do not, or where an axis cuts the tensors.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch

from stretto.checkpoint.peers import Peers
from stretto.exchange import all_gather_json, all_same
from stretto.layout.ranks import named
from stretto.parallel_state import ParallelState
from stretto.params import Slice, checksum, read_together, slices
from stretto.train.assemble import Assembly
from stretto.world import Axis

_KINDS = {
    "model": "weights",
    "exp_avg": "first moments",
    "exp_avg_sq": "second moments",
    "param": "rounded weights",
    "gathered": "gathered weights",
}

MOST = 8
"""Parameters that a message names."""


class UnsoundError(RuntimeError):
    """Weights or moments are not what they should be; the message is the same on every rank."""


def require_equal_replicas(built: Assembly[Any], state: ParallelState, step: int) -> None:
    """Raise UnsoundError on all ranks where two that hold the same block of a tensor differ in any bit of it."""
    held = pieces(built)
    sums = read_together([checksum(p.tensor) for p in held])
    own = {_key(p): value for p, value in zip(held, sums, strict=True)}
    names = [("dp", "cp"), ("tp",), ("embed",), *[("edp",)] * state.has("edp")]
    axes = [state.axis(*each) for each in names]
    found = [line for axis in axes for line in _parting(own, axis)]
    if said := _said(found, state):
        raise UnsoundError(
            f"replicas differ after step {step}:\n{said}\n  a bit flipped in memory, or one replica was computed in "
            "another way"
        )


def require_finite(built: Assembly[Any], state: ParallelState, step: int) -> None:
    """Raise UnsoundError on all ranks where a weight or moment is NaN or infinite, used in this step or not."""
    held = [p for p in pieces(built) if p.tensor.numel() and p.tensor.is_floating_point()]
    largest = read_together([torch.linalg.vector_norm(p.tensor, ord=torch.inf).double() for p in held])
    rank = state.world.rank
    found = [f"{_name(p)}: on rank {rank}" for p, most in zip(held, largest, strict=True) if not math.isfinite(most)]
    if said := _said(found, state):
        raise UnsoundError(f"after step {step} these hold NaN or infinity, and are not saved:\n{said}")


def pieces(built: Assembly[Any]) -> list[Slice]:
    """What this rank holds: masters and moments, and the parameters where they are rounded from masters, or gathered
    from those of others to stay."""
    weights = built.weights
    masters = built.optimizer.slices()  # after which no update is on its way
    narrow = [d for d in weights.declared if d.param.element_size() < 4]
    sharded = weights.sharding.params  # then whole weights are gathered anew for each use
    wide = [d for d in weights.declared if d.param.element_size() >= 4 and weights.sharding.state and not sharded]
    held = partial(weights.part, of=lambda bucket: bucket.shard) if sharded else (lambda p: p.data)
    position = weights.position()
    return [
        *masters,
        *slices(narrow, held, position, prefix="param/"),
        *slices(wide, lambda p: p.data, position, prefix="gathered/"),
    ]


def _key(piece: Slice) -> str:
    return json.dumps([_name(piece), piece.offsets, list(piece.tensor.shape)])


def _name(piece: Slice) -> str:
    kind, _, name = piece.name.partition("/")
    return f"{name} ({_KINDS.get(kind, kind)})"


def _parting(own: dict[str, int], axis: Axis) -> list[str]:
    """A line for each block of which the ranks of an axis hold more than one version."""
    if all_same(json.dumps(own).encode(), axis.size, axis.group):
        return []
    versions: dict[str, dict[int, int]] = {}
    for rank, said in zip(axis.ranks, all_gather_json(own, axis), strict=True):
        for key, value in said.items():
            versions.setdefault(key, {})[rank] = value
    return [f"{json.loads(key)[0]}: {_who(each)}" for key, each in versions.items() if len({*each.values()}) > 1]


def _who(version: dict[int, int]) -> str:
    """Which ranks have what few have; of as many on either side nobody can be told wrong."""
    (common, most), (_, second) = Counter(version.values()).most_common(2)
    if most == second:
        return f"{named(version)} differ"
    odd = [rank for rank, value in version.items() if value != common]
    rest = [rank for rank, value in version.items() if value == common]
    return f"{named(odd)}, unlike {named(rest)}"


def _said(found: Sequence[str], state: ParallelState) -> str:
    """The lines of all ranks, each once, the same text on every rank; empty where nobody found anything."""
    world = Peers.of(state.world, state.axis("tp", "cp", "dp", "pp").group)
    lines: Iterable[str] = [
        line for said in world.gather(json.dumps(found[:MOST])) for line in json.loads(said or "[]")
    ]
    lines = list(dict.fromkeys(lines))
    more = [f"  .. and {len(lines) - MOST} more"] * (len(lines) > MOST)
    return "\n".join([*(f"  {line}" for line in lines[:MOST]), *more])
