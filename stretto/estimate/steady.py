"""What a rank holds of a stage through the whole step, to the byte; and what of it comes and goes section by section.

It reads what the engine reads, `Sharding` and flat storage, so what it says of weights, gradients and optimizer is what
lives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from stretto.arguments.schema import Arguments
from stretto.estimate.memo import Memo
from stretto.estimate.sections import Sections
from stretto.estimate.shards import sharding_of, shards_of
from stretto.estimate.sizes import BYTES
from stretto.estimate.stages import stage_blocks
from stretto.estimate.stored import EMBEDDING, EXPERT, quantized_bytes, stored_tensors
from stretto.estimate.workspace import adds_by_copy_engines, rounded
from stretto.layout.chunks import CHUNK, SLOTS, slot_bytes
from stretto.layout.flat import Flat
from stretto.layout.grouping import Stored, by_section, by_size

STATE: Final[Mapping[str, int]] = MappingProxyType({"adamw": 2, "sgd": 1, "lion": 1, "muon": 2})
"""Vectors that an update rule keeps beside each master."""


@dataclass(frozen=True)
class Steady:
    """Bytes of one stage on one rank. `filling` are gradients that come and go and have memory of their own."""

    weights: int
    gradients: int
    masters: int
    optimizer: int
    streamed: int
    quantized: int
    """Weights of GEMMs in FP8 and their scales: of sharded ones a part, of others from the first use in a step on."""
    filling: int
    spare: int
    """What the allocator rounds these up by."""
    host: int
    saved: int
    """What of a checkpoint is this stage's alone, and its experts' part of it."""
    saved_experts: int
    joined: int
    """Masters on the host, where a save puts them together."""
    sections: Sections


@dataclass(frozen=True)
class _Bucket:
    """Tensors that share flat storage: elements of all of it, and of a rank's part."""

    tensors: tuple[Stored, ...]
    storage: Flat
    part: int

    @classmethod
    def of(cls, args: Arguments, tensors: Sequence[Stored]) -> _Bucket:
        """Of tensors of one kind."""
        shards = shards_of(args, tensors[0].kind) if sharding_of(args).state else 1
        storage = Flat(tuple(tensor.numel for tensor in tensors), shards)
        return cls(tuple(tensors), storage, storage.numel // shards)

    @property
    def whole(self) -> int:
        return self.storage.numel

    @property
    def trained(self) -> bool:
        """What is frozen has weights alone."""
        return bool(self.tensors[0].kind[1])

    @property
    def shared(self) -> bool:
        """Whether it is what both ends of the model share."""
        return self.tensors[0].kind[0] == EMBEDDING

    @property
    def sections(self) -> set[int]:
        """Those that are the first to use some of it."""
        return {tensor.section for tensor in self.tensors if tensor.section is not None}

    @property
    def quantized(self) -> bool:
        """Whether it is gathered in FP8, if it is sharded."""
        return self.tensors[0].quantized

    def gathered(self, item: int) -> int:
        """Bytes of all of it as GEMMs read it."""
        return self.whole * (1 if self.quantized else item)


def steady(args: Arguments, stage: int, *, embedding: bool, memo: Memo | None = None) -> Steady:
    """Of a stage; without `embedding` that of another stage on the rank is its own."""
    sharding, offload = sharding_of(args), args.optimizer.optimizer_cpu_offload
    item = BYTES[args.run.dtype]
    wide = max(4, item)
    buckets = _buckets(args, stage, memo or Memo(), embedding=embedding)
    moved = [each for each in buckets if each.trained]
    own = [each for each in buckets if sharding.params and each.quantized]
    master = (2 if args.optimizer.masters == "remainder" else wide) * (item < wide)
    moment = 2 if args.optimizer.moments == "bf16" else wide
    vectors = (master, *(moment,) * STATE[args.optimizer.optimizer])
    parts = sum(each.part for each in moved)
    optimizer = sum(vectors[1:]) * parts - moment * _without_second(args, stage, moved)
    saved = {of: _saved(args, stage, buckets, wide, vectors[1:], experts=of) for of in (True, False)}
    sections, filling = _passing(args, stage, buckets)
    return Steady(
        weights=item * sum(each.part if sharding.params else each.whole for each in buckets),
        gradients=wide * sum(each.part if sharding.grads else each.whole for each in moved),
        masters=0 if offload else master * parts,
        optimizer=0 if offload else optimizer,
        streamed=_streamed(args, moved, vectors) * offload,
        quantized=quantized_bytes(args, stage, gathered=sharding.params)
        + sum(each.part + BYTES["fp32"] * len(each.tensors) for each in own),
        filling=filling + _travelling(args, buckets),
        spare=_spare(args, buckets, item, () if offload else vectors),
        host=(master * parts + optimizer) * offload,
        saved=saved[False],
        saved_experts=saved[True],
        joined=wide * parts * (args.optimizer.masters == "remainder"),
        sections=sections,
    )


def _passing(args: Arguments, stage: int, buckets: Sequence[_Bucket]) -> tuple[Sections, int]:
    """What comes and goes section by section; and bytes of gradients that come and go in memory of their own."""
    sharding, item = sharding_of(args), BYTES[args.run.dtype]
    wide = max(4, item)
    # A shared embedding on a stage with both ends: used by the last section too; its gradient fills all the way back.
    both = args.parallel.pp == 1
    ends = [each for each in buckets if both and each.shared]
    cut = [each for each in buckets if each.storage.shards > 1]  # of experts over one rank nothing is
    spread = [each for each in cut if sharding.params and len(each.sections) > 1]
    turns = [each for each in cut if each.trained and not (both and each.shared) and each not in spread]
    used = _by_section([(each, each.gathered(item)) for each in cut if each not in spread], _sections(args, stage))
    used[-1:] = [n + sum(each.gathered(item) for each in ends) for n in used[-1:]]
    left = args.batch.microbatches(args.parallel.dp) > 1
    filled, last = _filled([(each.sections, wide * each.whole) for each in turns], len(used), left=left)
    across = _by_section([(each, each.whole) for each in buckets if each.quantized], len(used))
    tied = wide * sum(each.whole for each in ends if each.trained)
    throughout = wide * sum(each.whole for each in spread if each.trained)
    come_and_go = sharding.params and not adds_by_copy_engines(args)
    sections = Sections(
        weights=tuple(used) if sharding.params else (),
        gradients=tuple(filled) if come_and_go else (),
        all_weights=sum(each.gathered(item) for each in cut),
        keep=args.parallel.keep_units,
        transposed=tuple(across) if sharding.params else (),
        spread=sum(each.gathered(item) for each in spread),
        spread_over=frozenset(section for each in spread for section in each.sections),
        filled_throughout=tied * come_and_go + throughout,
        left=last * come_and_go,
    )
    filling = tied + wide * (_regions(turns) if sharding.params else _side_by_side(turns))
    return sections, filling * (sharding.grads and not come_and_go)


def _buckets(args: Arguments, stage: int, memo: Memo, *, embedding: bool) -> list[_Bucket]:
    """In the order in which a backward fills them."""
    tensors = [t for t in memo(stored_tensors, _unsharded(args), stage) if embedding or t.kind[0] != EMBEDDING]
    limit = int(args.parallel.bucket_mb * 2**20) // max(4, BYTES[args.run.dtype])
    groups = by_section(tensors) if sharding_of(args).params else by_size(tensors, limit)
    return [_Bucket.of(args, [tensors[n] for n in group]) for group in groups]


def _unsharded(args: Arguments) -> Arguments:
    """The settings that the tensors of a stage follow from, without those that cut them over data-parallel ranks."""
    p = args.parallel
    parallel = replace(p, sharding="none", dp=1, dp_shard=None)
    parallel = replace(parallel, schedule="1f1b", vpp=p.stages_per_rank, vpp_shape=p.shape)
    return replace(args, parallel=parallel, batch=replace(args.batch, global_batch=1))


def _by_section(sizes: Sequence[tuple[_Bucket, int]], sections: int) -> list[int]:
    """The sizes of all buckets of which each section uses some first."""
    found = [0] * sections
    for each, size in sizes:
        for section in each.sections:
            found[section] += size
    return found


def _filled(sizes: Sequence[tuple[set[int], int]], sections: int, *, left: bool) -> tuple[list[int], int]:
    """Gradients of a bucket that fills and of the one before it, at most while each section is at work; and those of
    the last two, where another backward follows. `sizes` are in the order in which they fill."""
    found, (before, last) = [0] * sections, [0, *(size for _, size in sizes)][-2:] if left and sizes else (0, 0)
    both = before + last
    for used_by, size in sizes:
        for section in used_by:
            found[section] = max(found[section], last + size)
        last = size
    return found, both


def _regions(buckets: Sequence[_Bucket]) -> int:
    """Elements of the regions that buckets have in turns, two for those over the same ranks."""
    kinds: dict[object, list[int]] = {}
    for each in buckets:
        kinds.setdefault(each.tensors[0].kind[0], []).append(each.whole)
    return sum(max(sizes[turn::2], default=0) for sizes in kinds.values() for turn in range(2))


def _side_by_side(buckets: Sequence[_Bucket]) -> int:
    """Elements of buckets of decayed and of other tensors, which fill side by side, two of each at a time."""
    kinds = [[each.whole for each in buckets if each.tensors[0].decayed is of] for of in (True, False)]
    return sum(sum(sorted(kind)[-2:]) for kind in kinds)


def _spare(args: Arguments, buckets: Sequence[_Bucket], item: int, vectors: Sequence[int]) -> int:
    """Of flat storage that stays. Memory that other GPUs read is not the allocator's."""
    sharding = sharding_of(args)
    if args.run.device == "cpu":
        return 0
    wide, found = max(4, item), 0
    shared = adds_by_copy_engines(args)
    for each in buckets:
        sizes = [size * each.part for size in vectors] * each.trained
        quantized = sharding.params and each.quantized  # of which the others read the part in FP8
        sizes += [] if shared and not quantized else [item * (each.part if sharding.params else each.whole)]
        sizes += [each.part] if quantized and not shared else []
        gradient = wide * (each.part if sharding.grads else each.whole)
        sizes += [] if shared and not sharding.grads else [gradient] * each.trained
        found += sum(rounded(size) - size for size in sizes)
    return found


def _streamed(args: Arguments, buckets: Sequence[_Bucket], itemsizes: Sequence[int]) -> int:
    """Bytes of the slots for chunks of this rank's parts of buckets; with muon those with matrices come whole."""
    most = max((each.part for each in buckets), default=0)
    chunk = most if args.optimizer.optimizer == "muon" else min(most, CHUNK)
    return SLOTS * slot_bytes(chunk, itemsizes)


def _saved(
    args: Arguments, stage: int, buckets: Sequence[_Bucket], wide: int, moments: Sequence[int], *, experts: bool
) -> int:
    """Bytes of masters and moments; an embedding of both ends is saved by the first."""
    mine = [b for b in buckets if (b.tensors[0].kind[0] == EXPERT) is experts and not (b.shared and stage)]
    trained = [each for each in mine if each.trained]
    found = sum((wide + sum(moments)) * each.part for each in trained)
    found -= moments[-1] * _without_second(args, stage, trained)
    return found + BYTES[args.run.dtype] * sum(each.part for each in mine if not each.trained)


def _travelling(args: Arguments, buckets: Sequence[_Bucket]) -> int:
    """Bytes of gradients in the dtype in which they travel, sent and received, of two buckets at a time."""
    narrow = args.parallel.reduce_dtype == "bf16" and (args.parallel.dp or 1) * args.parallel.cp > 1
    return 2 * BYTES["bf16"] * sum(sorted(each.whole for each in buckets)[-2:]) * narrow


def _without_second(args: Arguments, stage: int, buckets: Sequence[_Bucket]) -> int:
    """Elements of which muon keeps no second moment, on the rank with the fewest: matrices before all else of a bucket.

    Embeddings and head are in the first and last sections; what decays in a block is a matrix.
    """
    if args.optimizer.optimizer != "muon":
        return 0
    blocks = range(stage == 0, (stage == 0) + len(stage_blocks(args)[stage]))
    found = 0
    for each in buckets:
        others = [
            span.start
            for tensor, span in zip(each.tensors, each.storage.spans, strict=True)
            if not tensor.decayed or tensor.section not in blocks
        ]
        found += max(0, min(others, default=each.whole) - (each.whole - each.part))
    return found


def _sections(args: Arguments, stage: int) -> int:
    layers = stage_blocks(args)
    return (stage == 0) + len(layers[stage]) + (stage == len(layers) - 1)
