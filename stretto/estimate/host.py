"""Bytes of the host's memory that the ranks of a node take together: the kernel ends a run that needs more.

What processes, libraries and the page cache take beside it is not here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from stretto.arguments.schema import Arguments
from stretto.estimate.amounts import Amounts
from stretto.estimate.memo import Memo
from stretto.estimate.memory import held_by, rank_ledger
from stretto.estimate.shards import sharding_of, shards_of
from stretto.estimate.sizes import entering_bytes, in_flight
from stretto.estimate.stages import stage_blocks
from stretto.estimate.stored import EXPERT

LEAST: Final = 2**30 / 20
"""Bytes that are worth a word."""


@dataclass(frozen=True)
class HostMemory(Amounts):
    """Bytes, by what they are for. Names are what is printed."""

    device: int = 0
    """All that the ledger has of a device, where that is a CPU."""
    optimizer: int = 0
    """Masters and state of the update rule, where they lie in the host's memory."""
    activations: int = 0
    """What enters blocks and waits there for its backward."""
    staging: int = 0
    """The copy of what a rank writes, from which an asynchronous save is written."""
    joined: int = 0
    """Masters of weights and remainders, put together for a save."""

    @property
    def said(self) -> str:
        """What there is of it, in GiB, but for what rounds to nothing."""
        return ", ".join(f"{name} {size / 2**30:.1f}" for name, size in vars(self).items() if size >= LEAST)


class _Role(NamedTuple):
    """What a rank's bytes follow from: its place along the pipeline, and whether it writes what all tokens go through,
    and experts, to a checkpoint, or another rank with the same."""

    pp: int
    dense: bool
    routed: bool


def node_memory(args: Arguments, ranks: Iterable[int], memo: Memo | None = None) -> HostMemory:
    """Of these ranks together. A planner has a `memo` for what many of its runs share."""
    memo, layout = memo or Memo(), args.parallel.layout
    roles = Counter(_role(args, layout.coords(rank)) for rank in ranks)
    return sum((_rank(args, role, memo).times(n) for role, n in roles.items()), HostMemory())


def fullest_node(args: Arguments, memo: Memo | None = None) -> HostMemory:
    """Of the nodes that ranks fill in order the one that takes most; all ranks are one where nobody says its size."""
    world = args.parallel.layout.world
    size = args.parallel.gpus_per_node or world
    nodes = (range(first, min(first + size, world)) for first in range(0, world, size))
    memo = memo or Memo()
    return max((node_memory(args, ranks, memo) for ranks in nodes), key=lambda each: each.total)


def _role(args: Arguments, at: Mapping[str, int]) -> _Role:
    """Of equal pieces the first rank that holds them writes them."""
    sharded = sharding_of(args).state
    dense = (args.parallel.dp_shard or args.parallel.dp or 1) if sharded else 1
    routed = shards_of(args, (EXPERT,)) if sharded else 1
    return _Role(at["pp"], at["dp"] < dense and (sharded or at["cp"] == 0), at["edp"] < routed)


def _rank(args: Arguments, role: _Role, memo: Memo) -> HostMemory:
    held, found = held_by(args, role.pp, memo), rank_ledger(args, role.pp, memo)
    saves = args.checkpoint.save and args.checkpoint.async_save
    return HostMemory(
        device=found.total if args.run.device == "cpu" else 0,
        optimizer=found.host,
        activations=sum(_waiting(args, stage) for stage in held.stages),
        staging=saves * (role.dense * held.total("saved") + role.routed * held.total("saved_experts")),
        joined=args.checkpoint.save * held.total("joined"),
    )


def _waiting(args: Arguments, stage: int) -> int:
    """What enters the blocks of a stage, but for the last one; torch pins powers of two."""
    if args.run.recompute != "offload":
        return 0
    one = entering_bytes(args)
    one = one if args.run.device == "cpu" else 1 << (one - 1).bit_length()
    return in_flight(args, stage) * max(0, len(stage_blocks(args)[stage]) - 1) * one
