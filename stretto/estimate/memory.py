"""A ledger of a rank's memory: what stays through a step to the byte, what comes and goes, what activations take.

It reads what the engine reads, `Sharding` and flat storage, so what it says of weights, gradients and optimizer is what
lives. Activations are those of the formulas below, in front of any allocator's rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import pairwise
from types import MappingProxyType
from typing import Final, NamedTuple

from stretto.arguments.pipeline import num_stages, shape_of, vpp_of
from stretto.arguments.schema import Arguments
from stretto.arguments.trained import is_trained
from stretto.estimate.context import comm_of
from stretto.estimate.recompute import activations, policy_of
from stretto.estimate.sizes import BYTES, held_at_once, in_flight
from stretto.estimate.stages import stage_layers
from stretto.estimate.stored import EMBEDDING, EXPERT, stored_tensors
from stretto.estimate.transient import exchanged, logits
from stretto.layout.chunks import CHUNK, SLOTS, slot_bytes
from stretto.layout.flat import Flat
from stretto.layout.grouping import Stored, by_section, by_size
from stretto.layout.stages import placement
from stretto.schedule import DDP, Sharding
from stretto.schedule.sharding import MODES

STATE: Final[Mapping[str, int]] = MappingProxyType({"adamw": 2, "sgd": 1, "lion": 1, "muon": 2})
"""Vectors that an update rule keeps beside each master."""


@dataclass(frozen=True)
class Ledger:
    """Bytes of one rank, by what they are for. A field each; their names are what is printed."""

    weights: int
    """Kept through the step: all, or a shard."""
    gradients: int
    """Kept through the step, fp32 or wider."""
    masters: int
    """fp32 copies of narrower weights, or what is missing to them."""
    optimizer: int
    """State of the update rule."""
    streamed: int
    """Chunks of both on the device, where they lie in the host's memory."""
    gathered: int
    """Sections of the stage that are whole at a time, where weights are sharded."""
    reducing: int
    """Gradients that fill or are reduced, where gradients are sharded."""
    activations: int
    """What forwards keep for their backwards, of all microbatches under way."""
    exchanged: int
    """Keys and values of other ranks of cp and their gradients, of one layer at a time, and what is merged."""
    logits: int
    """Of the head, and their gradients, a piece at a time."""
    host: int = 0
    """Masters and state of the update rule in the host's memory."""

    @property
    def total(self) -> int:
        """All of the device's at once."""
        return sum(getattr(self, each.name) for each in fields(self) if each.name != "host")


def ledger(args: Arguments, stage: int, *, embedding: bool = True) -> Ledger:
    """The ledger of each rank that holds a pipeline stage; without `embedding`, one whose tied embedding is that of
    another stage on the rank."""
    return _ledger(_Halves.of(args), stage, embedding=embedding)


_PLAIN: Final = Arguments()


class _Halves(NamedTuple):
    """The settings that what is stored follows from, and those of what passes: a planner changes one or the other."""

    stored: Arguments
    passing: Arguments

    @classmethod
    def of(cls, args: Arguments) -> _Halves:
        """Of a run."""
        batch, run = replace(_PLAIN.batch, seq_len=args.batch.seq_len), replace(_PLAIN.run, dtype=args.run.dtype)
        both = replace(_PLAIN, model=args.model, tuning=args.tuning, run=run)
        stored = replace(both, parallel=args.parallel, batch=batch, optimizer=args.optimizer)
        unsharded = replace(args.parallel, sharding="none")
        return cls(stored, replace(both, parallel=unsharded, batch=args.batch, data=args.data, run=args.run))


def _ledger(halves: _Halves, stage: int, *, embedding: bool) -> Ledger:
    kept, exchanged, logits = _passing(halves.passing, stage)
    stored = _stored(halves.stored, stage, embedding)
    return replace(stored, activations=kept, exchanged=exchanged, logits=logits)


@lru_cache(maxsize=4096)
def _passing(args: Arguments, stage: int) -> tuple[int, int, int]:
    """Activations, what is exchanged, and logits: they do not follow from what is sharded."""
    last = stage == num_stages(args.parallel) - 1
    return activations(args, stage, policy_of(args, stage)), exchanged(args, stage), logits(args) * last


@lru_cache(maxsize=4096)
def _stored(args: Arguments, stage: int, embedding: bool) -> Ledger:
    """What follows from neither microbatches nor recomputation: a planner asks for it again and again."""
    sharding, keep = sharding_of(args), args.parallel.keep_units
    item = BYTES[args.run.dtype]
    wide = max(4, item)
    tensors = [t for t in stored_tensors(args, stage) if embedding or t.kind[0] != EMBEDDING]
    limit = int(args.parallel.bucket_mb * 2**20) // wide
    groups = by_section(tensors) if sharding.params else by_size(tensors, limit)
    shards = [_shards(args, tensors[group[0]].kind) if sharding.state else 1 for group in groups]
    flats = [
        Flat(tuple(tensors[n].numel for n in group), n_shards).numel
        for group, n_shards in zip(groups, shards, strict=True)
    ]
    trained = [bool(tensors[group[0]].kind[1]) for group in groups]
    parts = [flat // n for flat, n in zip(flats, shards, strict=True)]
    whole, part = sum(flats), sum(parts)
    # What is frozen has weights alone.
    moved, moved_part = (sum(n for n, t in zip(each, trained, strict=True) if t) for each in (flats, parts))
    sections = [{tensors[n].section for n in group} for group in groups]
    used = [sum(f for f, s in zip(flats, sections, strict=True) if n in s) for n in range(_sections(args, stage))]
    # A shared embedding on a stage with both ends: used by the last section too; its gradient fills all the way back.
    both = args.model.shared_embedding and args.parallel.pp == 1
    tied = sum(f for f, group in zip(flats, groups, strict=True) if both and tensors[group[0]].kind[0] == EMBEDDING)
    used[-1:] = [used[-1] + tied] if used else []
    # Buckets of decayed and of other tensors fill side by side, two of each at a time.
    others: dict[bool, list[int]] = {}
    for size, group, t in zip(flats, groups, trained, strict=True):
        if t and (not tied or tensors[group[0]].kind[0] != EMBEDDING):
            others.setdefault(sharding.params or tensors[group[0]].decayed, []).append(size)
    filling = tied * is_trained("model.embed_tokens.weight", args.tuning) + sum(
        sum(sorted(sizes)[-2:]) for sizes in others.values()
    )
    kept = sum(used[max(0, len(used) - keep) :]) if keep else 0
    pairs = max((a + b for a, b in pairwise(used)), default=sum(used))
    narrow, offload = item < wide, args.optimizer.optimizer_cpu_offload
    master = (2 if args.optimizer.masters == "remainder" else wide) * narrow
    moment = 2 if args.optimizer.moments == "bf16" else wide
    masters = master * moved_part
    optimizer = moment * (
        moved_part * STATE[args.optimizer.optimizer] - _without_second(args, stage, tensors, groups, shards)
    )
    return Ledger(
        weights=item * (part if sharding.params else whole),
        gradients=wide * (moved_part if sharding.grads else moved),
        masters=0 if offload else masters,
        optimizer=0 if offload else optimizer,
        streamed=_streamed(args, parts, trained, (master, *(moment,) * STATE[args.optimizer.optimizer])) * offload,
        gathered=item * min(whole, pairs + kept) * sharding.params,
        reducing=wide * filling * sharding.grads + _travelling(args, flats),
        activations=0,
        exchanged=0,
        logits=0,
        host=(masters + optimizer) * offload,
    )


_ONCE: Final = frozenset({"streamed", "gathered", "reducing", "exchanged", "logits"})
"""What is there a piece at a time."""


def rank_ledger(args: Arguments, rank: int) -> Ledger:
    """The ledger of each rank at a place along the pipeline, of all of its stages: what is there a piece at a time
    counts as in the stage where it is largest."""
    return _rank_ledger(_Halves.of(args), rank)


def _rank_ledger(halves: _Halves, rank: int) -> Ledger:
    args = halves.passing
    p = args.parallel
    homes = placement(p.pp, vpp_of(p), shape_of(p))
    mine = [s for s, home in enumerate(homes) if home == rank]
    last = len(homes) - 1  # its tied embedding is that of the first stage, where both are here
    each = [_ledger(halves, s, embedding=not (0 < s == last and 0 in mine)) for s in mine]
    if len(each) == 1:
        return each[0]
    found = {f.name: (max if f.name in _ONCE else sum)(getattr(one, f.name) for one in each) for f in fields(Ledger)}
    # Its stages do not all hold most at the same time.
    found["activations"] = found["activations"] * held_at_once(args, rank) // sum(in_flight(args, s) for s in mine)
    return Ledger(**found)


def fullest(args: Arguments) -> int:
    """Bytes of the rank that holds most."""
    halves = _Halves.of(args)
    return max(_rank_ledger(halves, rank).total for rank in _unlike(halves.passing))


@lru_cache(maxsize=64)
def _unlike(args: Arguments) -> Iterable[int]:
    """Ranks of the pipeline of which one holds most: of those whose stages are alike, the one with most under way."""
    p, m = args.parallel, args.model
    if args.run.activation_budget is not None or args.tuning.freeze:
        return range(p.pp)  # what a stage computes once more, or trains, follows from more than its layers
    layers, homes = stage_layers(args), placement(p.pp, vpp_of(p), shape_of(p))
    alike: dict[object, list[int]] = {}
    for rank in range(p.pp):
        mine = [s for s, home in enumerate(homes) if home == rank]
        held = [
            [(m.is_sparse(n), m.window_of(n), comm_of(args, n) if p.cp > 1 else "") for n in layers[s]] for s in mine
        ]
        alike.setdefault((0 in mine, len(homes) - 1 in mine, repr(held)), []).append(rank)
    return [max(each, key=lambda rank: held_at_once(args, rank)) for each in alike.values()]


def _streamed(args: Arguments, parts: Sequence[int], trained: Sequence[bool], itemsizes: Sequence[int]) -> int:
    """Bytes of the slots for chunks of this rank's parts of buckets; with muon those with matrices come whole."""
    most = max((part for part, moved in zip(parts, trained, strict=True) if moved), default=0)
    chunk = most if args.optimizer.optimizer == "muon" else min(most, CHUNK)
    return SLOTS * slot_bytes(chunk, itemsizes)


def _travelling(args: Arguments, flats: Sequence[int]) -> int:
    """Bytes of gradients in the dtype in which they travel, sent and received, of two buckets at a time."""
    narrow = args.parallel.reduce_dtype == "bf16" and (args.parallel.dp or 1) * args.parallel.cp > 1
    return 2 * BYTES["bf16"] * sum(sorted(flats)[-2:]) * narrow


def _without_second(
    args: Arguments, stage: int, tensors: Sequence[Stored], groups: Sequence[Sequence[int]], shards: Sequence[int]
) -> int:
    """Elements of which muon keeps no second moment, on the rank with the fewest: matrices before all else of a bucket.

    Embeddings and head are in the first and last sections; what decays in a block is a matrix.
    """
    if args.optimizer.optimizer != "muon":
        return 0
    blocks = range(stage == 0, (stage == 0) + len(stage_layers(args)[stage]))
    found = 0
    for group, parts in zip(groups, shards, strict=True):
        if not tensors[group[0]].kind[1]:  # frozen
            continue
        storage = Flat(tuple(tensors[n].numel for n in group), parts)
        spans, flat = storage.spans, storage.numel
        others = [
            span.start
            for n, span in zip(group, spans, strict=True)
            if not tensors[n].decayed or tensors[n].section not in blocks
        ]
        found += max(0, min(others, default=flat) - (parts - 1) * (flat // parts))
    return found


def sharding_of(args: Arguments) -> Sharding:
    """What the run shards: nothing over one rank."""
    return MODES[args.parallel.sharding] if shard_ranks(args) > 1 else DDP


def shard_ranks(args: Arguments) -> int:
    """Ranks that share one copy of what is sharded."""
    return (args.parallel.dp_shard or args.parallel.dp or 1) * args.parallel.cp


def _shards(args: Arguments, kind: tuple[object, ...]) -> int:
    """Ranks that share one copy of a bucket: experts have replicas along edp."""
    p = args.parallel
    return p.tp * shard_ranks(args) // (p.ep * p.etp) if kind[0] == EXPERT else shard_ranks(args)


def fitting(args: Arguments, limit: float) -> dict[str, tuple[int, bool]]:
    """For each mode of sharding: bytes of the fullest rank, and whether they fit into `limit` bytes."""
    found = {}
    for mode in MODES:
        other = replace(args, parallel=replace(args.parallel, sharding=mode))  # type: ignore[arg-type]
        most = fullest(other)
        found[mode] = most, most <= limit
    return found


def _sections(args: Arguments, stage: int) -> int:
    layers = stage_layers(args)
    return (stage == 0) + len(layers[stage]) + (stage == len(layers) - 1)
