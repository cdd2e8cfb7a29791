"""Sizes of what passes through a rank."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from stretto.arguments.schema import Arguments
from stretto.sequence import local_length

BYTES: Final[Mapping[str, int]] = MappingProxyType({"fp64": 8, "fp32": 4, "bf16": 2})


def local_tokens(args: Arguments) -> int:
    """Of a microbatch on one rank, slots without a token included."""
    b, p = args.batch, args.parallel
    if p.cp == 1:
        return b.seq_len * b.micro_batch
    return local_length(b.seq_len, p.cp, p.tp if p.sequence_parallel else 1) * b.micro_batch


def in_flight(args: Arguments, stage: int) -> int:
    """Microbatches that went forward through a stage and not yet back, at most."""
    p, b = args.parallel, args.batch
    microbatches = b.microbatches(p.dp)
    return microbatches if p.schedule == "gpipe" else min(microbatches, p.pp - stage)


def entering_bytes(args: Arguments) -> int:
    """Of an activation [s(/t), b, h] between blocks."""
    p = args.parallel
    return BYTES[args.run.dtype] * args.model.hidden * local_tokens(args) // (p.tp if p.sequence_parallel else 1)


def joined_bytes(args: Arguments) -> int:
    """What a layer that predicts a further token keeps beside its block: the embedding, both halves that are joined,
    what the last norm takes, and the gradient that the head has made of what it gives."""
    return 5 * entering_bytes(args)
