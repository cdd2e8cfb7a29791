"""What a rank holds of a stage through the whole step, to the byte; and what of it comes and goes section by section.

It reads what the engine reads, `Sharding` and flat storage, so what it says of weights, gradients and optimizer is what
lives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from stretto.arguments.schema import Arguments
from stretto.arguments.trained import is_trained
from stretto.estimate.shards import sharding_of, shards_of
from stretto.estimate.sizes import BYTES
from stretto.estimate.stages import stage_layers
from stretto.estimate.stored import EMBEDDING, quantized_bytes, stored_tensors
from stretto.estimate.workspace import adds_by_copy_engines, rounded
from stretto.layout.chunks import CHUNK, SLOTS, slot_bytes
from stretto.layout.flat import Flat
from stretto.layout.grouping import Stored, by_section, by_size

STATE: Final[Mapping[str, int]] = MappingProxyType({"adamw": 2, "sgd": 1, "lion": 1, "muon": 2})
"""Vectors that an update rule keeps beside each master."""


@dataclass(frozen=True)
class Sections:
    """Of weights and gradients that are sharded: bytes of each section of a stage, where they are whole."""

    weights: tuple[int, ...] = ()
    gradients: tuple[int, ...] = ()
    all_weights: int = 0
    keep: int = 0
    """So many of the last stay whole from forward to backward."""
    tied: int = 0
    """Gradients of a shared embedding, which fill all the way back."""
    left: bool = False
    """Whether two buckets of a backward before wait until others want their memory."""

    def gathered(self, at: int, *, back: bool) -> int:
        """Bytes that are whole while a section is at work, and the next one on its way."""
        here = {at, at - 1 if back else at + 1} | {n for n in range(len(self.weights) - self.keep, at) if n >= 0}
        return min(self.all_weights, sum(w for n, w in enumerate(self.weights) if n in here))

    def filling(self, at: int, *, back: bool) -> int:
        """Bytes of gradients that fill or are reduced: of a section and the one behind it; forward those that are left
        of the backward before, of the first sections."""
        if back:
            here = {at, at + 1} if at + 1 < len(self.gradients) or not self.left else {at, 0}
        else:
            here = {0, 1} if self.left else set()
        return sum(g for n, g in enumerate(self.gradients) if n in here) + self.tied * back


@dataclass(frozen=True)
class Steady:
    """Bytes of one stage on one rank. `filling` are gradients that come and go and have memory of their own."""

    weights: int
    gradients: int
    masters: int
    optimizer: int
    streamed: int
    quantized: int
    """Weights of GEMMs in FP8 and their scales, from the first use in a step to its end."""
    filling: int
    spare: int
    """What the allocator rounds these up by."""
    host: int
    sections: Sections


def steady(args: Arguments, stage: int, *, embedding: bool) -> Steady:
    """Of a stage; without `embedding` that of another stage on the rank is its own."""
    sharding, keep = sharding_of(args), args.parallel.keep_units
    item = BYTES[args.run.dtype]
    wide = max(4, item)
    tensors = [t for t in stored_tensors(args, stage) if embedding or t.kind[0] != EMBEDDING]
    limit = int(args.parallel.bucket_mb * 2**20) // wide
    groups = by_section(tensors) if sharding.params else by_size(tensors, limit)
    shards = [shards_of(args, tensors[group[0]].kind) if sharding.state else 1 for group in groups]
    flats = [
        Flat(tuple(tensors[n].numel for n in group), n_shards).numel
        for group, n_shards in zip(groups, shards, strict=True)
    ]
    trained = [bool(tensors[group[0]].kind[1]) for group in groups]
    parts = [flat // n for flat, n in zip(flats, shards, strict=True)]
    whole, part = sum(flats), sum(parts)
    # What is frozen has weights alone.
    moved, moved_part = (sum(n for n, t in zip(each, trained, strict=True) if t) for each in (flats, parts))
    at = [{tensors[n].section for n in group} for group in groups]
    used = [sum(f for f, s in zip(flats, at, strict=True) if n in s) for n in range(_sections(args, stage))]
    moves = [f * t for f, t in zip(flats, trained, strict=True)]
    # A shared embedding on a stage with both ends: used by the last section too; its gradient fills all the way back.
    both = args.model.shared_embedding and args.parallel.pp == 1
    tied = sum(f for f, group in zip(flats, groups, strict=True) if both and _shared(tensors, group))
    tied_filling = wide * tied * is_trained("model.embed_tokens.weight", args.tuning)
    filled = [
        sum(f for f, s, g in zip(moves, at, groups, strict=True) if n in s and not (tied and _shared(tensors, g)))
        for n in range(len(used))
    ]
    used[-1:] = [used[-1] + tied] if used else []
    # Buckets of decayed and of other tensors fill side by side, two of each at a time.
    others: dict[bool, list[int]] = {}
    for size, group, t in zip(flats, groups, trained, strict=True):
        if t and not (tied and _shared(tensors, group)):
            others.setdefault(sharding.params or tensors[group[0]].decayed, []).append(size)
    filling = tied_filling + wide * sum(sum(sorted(sizes)[-2:]) for sizes in others.values())
    narrow, offload = item < wide, args.optimizer.optimizer_cpu_offload
    master = (2 if args.optimizer.masters == "remainder" else wide) * narrow
    moment = 2 if args.optimizer.moments == "bf16" else wide
    masters = master * moved_part
    vectors = () if offload else (master, *(moment,) * STATE[args.optimizer.optimizer])
    optimizer = moment * (
        moved_part * STATE[args.optimizer.optimizer] - _without_second(args, stage, tensors, groups, shards)
    )
    turns = sharding.params and not adds_by_copy_engines(args)
    sections = Sections(
        weights=tuple(item * n for n in used) if sharding.params else (),
        gradients=tuple(wide * n for n in filled) if turns else (),
        all_weights=item * whole,
        keep=keep,
        tied=tied_filling * turns,
        left=args.batch.microbatches(args.parallel.dp) > 1,
    )
    return Steady(
        weights=item * (part if sharding.params else whole),
        gradients=wide * (moved_part if sharding.grads else moved),
        masters=0 if offload else masters,
        optimizer=0 if offload else optimizer,
        streamed=_streamed(args, parts, trained, (master, *(moment,) * STATE[args.optimizer.optimizer])) * offload,
        quantized=quantized_bytes(args, stage),
        filling=filling * (sharding.grads and not turns) + _travelling(args, flats),
        spare=_spare(args, zip(flats, parts, trained, strict=True), item, vectors),
        host=(masters + optimizer) * offload,
        sections=sections,
    )


def _spare(args: Arguments, buckets: Iterable[tuple[int, int, bool]], item: int, vectors: Sequence[int]) -> int:
    """Of flat storage that stays. Memory that other GPUs read is not the allocator's."""
    sharding = sharding_of(args)
    if args.run.device == "cpu":
        return 0
    wide, found = max(4, item), 0
    shared = adds_by_copy_engines(args)
    for flat, part, trained in buckets:
        sizes = [size * part for size in vectors] * trained
        sizes += [] if shared else [item * (part if sharding.params else flat)]
        sizes += [] if shared and not sharding.grads else [wide * (part if sharding.grads else flat)] * trained
        found += sum(rounded(size) - size for size in sizes)
    return found


def _shared(tensors: Sequence[Stored], group: Sequence[int]) -> bool:
    """Whether it is what both ends of the model share."""
    return tensors[group[0]].kind[0] == EMBEDDING


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


def _sections(args: Arguments, stage: int) -> int:
    layers = stage_layers(args)
    return (stage == 0) + len(layers[stage]) + (stage == len(layers) - 1)
