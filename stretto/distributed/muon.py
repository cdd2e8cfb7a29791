"""Muon on sharded storage: each matrix is gathered to one rank, orthogonalized there, and scattered back.

The momentum is elementwise, and is kept in shards like any state. What it points to goes two hops: over the ranks
that share the flat storage, then over those that cut the matrix. Each hop is one all-to-all for a bucket, and leads to
the rank that owns the matrix; the same hops lead back. Owners follow from shapes alone, the work spread evenly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from stretto.collectives import all_reduce_, all_to_all_parts
from stretto.distributed.bucket import Bucket
from stretto.distributed.rules import MuonRule
from stretto.layout.flat import overlap
from stretto.parallel_state import ParallelState
from stretto.params import Block, Logical
from stretto.world import Axis

COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Of the quintic iteration (Jordan et al., 2024)."""


def orthogonalized(matrix: Tensor, steps: int) -> Tensor:
    """Newton-Schulz: the singular values of `matrix` [m, n] go to about 1, in its dtype."""
    a, b, c = COEFFICIENTS
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.mT
    x = x / (torch.linalg.matrix_norm(x) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    found: Tensor = x if wide else x.mT
    return found


@dataclass(frozen=True)
class Job:
    """A matrix and who orthogonalizes it: places on the axis of its bucket, and on the axis that cuts it."""

    of: Logical
    span: range
    """In the bucket's whole flat storage."""
    owner: int
    cut: Axis
    """Of one rank where it is not cut."""
    cut_owner: int
    blocks: tuple[Block, ...]
    """What each rank of `cut` holds."""
    counts: tuple[bool, ...]
    """Which of these are not copies of another's."""


class Orthogonalizer:
    """Orthogonalizes in place what lies in a bucket's own range, for each matrix of it as a whole."""

    def __init__(self, buckets: Sequence[Bucket], state: ParallelState, rule: MuonRule) -> None:
        self.rule = rule
        loads: dict[tuple[Axis, int, Axis, int], float] = {}
        self.jobs = {bucket: _jobs(bucket, state, loads) for bucket in buckets if not bucket.frozen}

    def __call__(self, bucket: Bucket, flat: Tensor) -> None:
        """`flat` has what is this rank's of the bucket; all ranks that hold a part of it call this together."""
        jobs, rank, shared = self.jobs[bucket], bucket.axis.rank, bucket.sharding.state
        if not jobs:
            return
        mine = [job for job in jobs if job.owner == rank]
        stored = _gather(bucket, jobs, flat) if shared else [flat[job.span.start : job.span.stop] for job in mine]
        views = [flat_.view(job.of.block.stored) for job, flat_ in zip(mine, stored, strict=True)]
        for axis in dict.fromkeys(job.cut for job in mine):
            chosen = [(job, view) for job, view in zip(mine, views, strict=True) if job.cut == axis]
            parts = [[part for _, part in job.of.block.views(view)] for job, view in chosen]
            self._cut([job for job, _ in chosen], parts, axis, flat, bucket.weights.dtype)
        if shared:
            _scatter(bucket, jobs, flat, stored)
        elif bucket.axis.size > 1:
            for job in jobs:
                if job.owner != rank:
                    flat[job.span.start : job.span.stop].zero_()
            all_reduce_(flat, bucket.axis).wait()  # one rank has a number, the others add zero: the same bits

    def _cut(
        self, jobs: Sequence[Job], parts: Sequence[list[Tensor]], axis: Axis, like: Tensor, dtype: torch.dtype
    ) -> None:
        """Matrices that are cut along `axis`, in place: `parts` are the rectangles that this rank has of each."""
        size, me = axis.size, axis.rank
        mine = [job for job in jobs if job.cut_owner == me]
        there = [
            [part for job, own in zip(jobs, parts, strict=True) if job.cut_owner == rank for part in own]
            for rank in range(size)
        ]
        sent = [
            [
                part
                for job, own in zip(jobs, parts, strict=True)
                if job.cut_owner == rank and job.counts[me]
                for part in own
            ]
            for rank in range(size)
        ]
        sizes = [sum(prod(job.blocks[rank].shape) for job in mine if job.counts[rank]) for rank in range(size)]
        arrived = all_to_all_parts([_joined(each, like) for each in sent], sizes, axis)
        whole = [like.new_empty(job.of.spec.shape) for job in mine]
        for rank, flat in enumerate(arrived):
            _fill([b for x, job in zip(whole, mine, strict=True) if job.counts[rank] for b in _of(x, job, rank)], flat)
        for x in whole:
            x.copy_(self._one(x, dtype))
        blocks = [[b for x, job in zip(whole, mine, strict=True) for b in _of(x, job, rank)] for rank in range(size)]
        back = [_joined(each, like) for each in blocks]
        returned = all_to_all_parts(back, [sum(part.numel() for part in each) for each in there], axis)
        for each, flat in zip(there, returned, strict=True):
            _fill(each, flat)

    def _one(self, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        """A whole matrix; bf16 where the weights are bf16, as published. An update has the size of AdamW's."""
        scale: float = 0.2 * max(matrix.shape) ** 0.5
        return orthogonalized(matrix.to(dtype), self.rule.iterations) * scale


def _jobs(bucket: Bucket, state: ParallelState, loads: dict[tuple[Axis, int, Axis, int], float]) -> list[Job]:
    """The matrices of a bucket: each goes to the owner with the least work so far, the largest first."""
    found: dict[int, Job] = {}
    matrices = [(item, part) for item in bucket.items if item.matrix for part in item.logical]
    order = sorted(range(len(matrices)), key=lambda n: -_work(matrices[n][1]))
    for n in order:
        item, part = matrices[n]
        axes = {cut.axis: cut.copies for cut in part.spec.shard if state.axis(cut.axis).size > 1}
        if len(axes) > 1:
            raise ValueError(f"{part.name} is cut along {' and '.join(axes)}: Muon gathers along one axis")
        name = next(iter(axes), None)
        cut = Axis.single("") if name is None else state.axis(name)
        places = [Axis(name or "", rank, cut.ranks) for rank in range(cut.size)]
        blocks = tuple(
            part.spec.block({a.axis: state.axis(a.axis) for a in part.spec.shard} | {name: place})
            if name
            else part.block
            for place in places
        )
        owners = [(bucket.axis, d, cut, t) for d in range(bucket.axis.size) for t in range(cut.size)]
        least = min(owners, key=lambda owner: loads.get(owner, 0.0))
        loads[least] = loads.get(least, 0.0) + _work(part)
        counts = tuple(rank % axes[name] == 0 if name else True for rank in range(cut.size))
        found[n] = Job(part, bucket.span(item, part), least[1], cut, least[3], blocks, counts)
    return [found[n] for n in sorted(found)]


def _work(part: Logical) -> float:
    return float(prod(part.spec.shape) * min(part.spec.shape))


def _gather(bucket: Bucket, jobs: Sequence[Job], flat: Tensor) -> list[Tensor]:
    """What each of this rank's jobs has in whole flat storage, from the shards of all ranks."""
    axis, own = bucket.axis, bucket.own
    sent = [[_within(flat, own, job.span) for job in jobs if job.owner == rank] for rank in range(axis.size)]
    mine = [job for job in jobs if job.owner == axis.rank]
    held = [[len(overlap(bucket.flat.shard(rank), job.span)) for job in mine] for rank in range(axis.size)]
    arrived = all_to_all_parts([_joined(each, flat) for each in sent], [sum(each) for each in held], axis)
    parts = [torch.split(whole, sizes) for whole, sizes in zip(arrived, held, strict=True)]
    return [torch.cat([parts[rank][n] for rank in range(axis.size)]) for n in range(len(mine))]


def _scatter(bucket: Bucket, jobs: Sequence[Job], flat: Tensor, stored: Sequence[Tensor]) -> None:
    """The way back of `_gather`."""
    axis, own = bucket.axis, bucket.own
    mine = [job for job in jobs if job.owner == axis.rank]
    back = [
        [_within(x, job.span, bucket.flat.shard(rank)) for x, job in zip(stored, mine, strict=True)]
        for rank in range(axis.size)
    ]
    places = [[_within(flat, own, job.span) for job in jobs if job.owner == rank] for rank in range(axis.size)]
    sizes = [sum(len(place) for place in each) for each in places]
    for each, whole in zip(places, all_to_all_parts([_joined(x, flat) for x in back], sizes, axis), strict=True):
        for place, part in zip(each, torch.split(whole, [len(place) for place in each]), strict=True):
            place.copy_(part)


def _within(x: Tensor, held: range, wanted: range) -> Tensor:
    """What `x`, which has the elements `held`, has of those `wanted`."""
    inside = overlap(held, wanted)
    return x[inside.start - held.start : inside.stop - held.start] if inside else x[:0]


def _of(whole: Tensor, job: Job, rank: int) -> list[Tensor]:
    """What a rank of the job's axis holds of a whole matrix."""
    places = job.blocks[rank].parts()
    return [whole[tuple(slice(o, o + n) for o, n in zip(offsets, shape, strict=True))] for _, offsets, shape in places]


def _joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts]) if parts else like.new_empty(0)


def _fill(places: Sequence[Tensor], flat: Tensor) -> None:
    """Write what came in one piece to its places."""
    for place, part in zip(places, torch.split(flat, [each.numel() for each in places]), strict=True):
        place.copy_(part.view(place.shape))
