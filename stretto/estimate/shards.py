"""Which ranks share one copy of what is sharded."""

from __future__ import annotations

from stretto.arguments.schema import Arguments
from stretto.estimate.stored import EXPERT
from stretto.schedule import DDP, Sharding
from stretto.schedule.sharding import MODES


def sharding_of(args: Arguments) -> Sharding:
    """What the run shards: nothing over one rank."""
    return MODES[args.parallel.mode] if shard_ranks(args) > 1 else DDP


def shard_ranks(args: Arguments) -> int:
    """Ranks that share one copy of what is sharded."""
    return (args.parallel.dp_shard or args.parallel.dp or 1) * args.parallel.cp


def shards_of(args: Arguments, kind: tuple[object, ...]) -> int:
    """Ranks that share one copy of a bucket: experts have replicas along edp."""
    p = args.parallel
    return p.tp * shard_ranks(args) // (p.ep * p.etp) if kind[0] == EXPERT else shard_ranks(args)
