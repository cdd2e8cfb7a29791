"""Sizes of what passes through a rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from math import ceil, comb
from types import MappingProxyType
from typing import Final

import numpy as np

from stretto.arguments.schema import Arguments
from stretto.layout.schedules import FAMILIES
from stretto.schedule import schedule_for
from stretto.schedule.actions import B, F, W
from stretto.schedule.blocks import StageBlock
from stretto.schedule.greedy import most_alive
from stretto.sequence import local_length

BYTES: Final[Mapping[str, int]] = MappingProxyType({"fp64": 8, "fp32": 4, "bf16": 2})


def local_tokens(args: Arguments) -> int:
    """Of a microbatch on one rank, slots without a token included."""
    b, p = args.batch, args.parallel
    if p.cp == 1:
        return b.seq_len * b.micro_batch
    return local_length(b.seq_len, p.cp, p.tp if p.sequence_parallel else 1) * b.micro_batch


def most_crossing(args: Arguments) -> int:
    """Other ranks that a token of a sparse layer may go to, at most."""
    m, p = args.model, args.parallel
    return min(m.top_k * p.etp, p.ep * p.etp - 1)


def crossing(args: Arguments) -> float:
    """Other ranks that a token of a sparse layer goes to, where all choices of experts are as likely."""
    m, p = args.model, args.parallel
    none = comb(m.experts - m.experts // p.ep, m.top_k) / comb(m.experts, m.top_k) if m.experts else 1.0
    return (p.ep * p.etp - 1) * (1 - none)


def in_halves(args: Arguments, blocks: Iterable[StageBlock]) -> bool:
    """Whether a microbatch goes through these blocks of a stage in two halves of its samples."""
    p, sparse = args.parallel, args.model.is_sparse
    return p.ep_comm_overlap and p.ep * p.etp > 1 and any(b.feed_forward and sparse(b.layer) for b in blocks)


def in_flight(args: Arguments, stage: int) -> int:
    """Microbatches that went forward through a stage and not yet back, weight gradients included, at most.

    Of `auto`, whose order is not known yet, as many as it may have on average over the stages of a rank.
    """
    p, microbatches = args.parallel, args.batch.microbatches(args.parallel.dp)
    if p.schedule == "auto":
        return min(microbatches, ceil(p.schedule_memory or p.pp))
    return _most_alive(p.schedule, p.pp, p.stages_per_rank, microbatches)[0][stage]


def held_at_once(args: Arguments, rank: int) -> int:
    """The same of all stages of a rank together, each with its own activation."""
    p, microbatches = args.parallel, args.batch.microbatches(args.parallel.dp)
    if p.schedule == "auto":
        return p.stages_per_rank * in_flight(args, 0)
    return _most_alive(p.schedule, p.pp, p.stages_per_rank, microbatches)[1][rank]


@cache
def _most_alive(name: str, pp: int, vpp: int, microbatches: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """For each stage and each rank, by the order of the schedule of this name; orders in a V repeat, so a few periods
    say it all."""
    m = min(microbatches, 4 * pp) if FAMILIES[name].shape == "v" else microbatches
    s = schedule_for(name, pp, m, vpp)
    change = np.select([s.table.op == F, (s.table.op == B) | (s.table.op == W)], [1, -1])
    return tuple(int(np.cumsum(change[s.table.stage == k]).max()) for k in range(pp * vpp)), tuple(most_alive(s))


def entering_bytes(args: Arguments) -> int:
    """Of an activation [s(/t), b, h] between blocks."""
    p = args.parallel
    return BYTES[args.run.dtype] * args.model.hidden * local_tokens(args) // (p.tp if p.sequence_parallel else 1)


def joined_bytes(args: Arguments) -> int:
    """What a layer that predicts a further token keeps beside its block: the embedding, both halves that are joined,
    what the last norm takes, and the gradient that the head has made of what it gives."""
    return 5 * entering_bytes(args)
