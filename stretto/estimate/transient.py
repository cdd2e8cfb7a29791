"""What a rank holds for a moment in each microbatch, whatever it keeps: of attention over ranks, and of the head."""

from __future__ import annotations

from typing import Final

from stretto.arguments.schema import Arguments
from stretto.estimate.context import comm_of
from stretto.estimate.sizes import BYTES, local_tokens
from stretto.estimate.stages import stage_layers

HEAD: Final = 2**28
"""Bytes of logits that exist at once, at most (one row of tokens at least)."""


def exchanged(args: Arguments, stage: int) -> int:
    """Bytes of a layer's attention over cp, or over documents: the largest of the ways that its layers take.

    All keys and values in order, as they came, and their gradients in fp32 or wider; of a ring two blocks and what
    goes home. The output is merged in fp32 or wider.
    """
    m, p = args.model, args.parallel
    layers = stage_layers(args)[stage]
    if not layers or (p.cp == 1 and not args.data.packing):
        return 0
    item = BYTES[args.run.dtype]
    wide, tokens = max(4, item), local_tokens(args)
    kv = 2 * max(1, m.num_kv_heads // p.tp) * m.dim_per_head
    found = []
    for comm in {comm_of(args, layer) for layer in layers}:
        blocks = p.cp if comm == "all-gather" else 1
        rings = 2 if comm in ("ring", "hybrid") else 1
        merged = tokens * m.heads // p.tp * m.dim_per_head * wide
        found.append(merged + tokens * kv * ((blocks + rings) * item + (blocks + rings) * wide))
    return max(found)


def logits(args: Arguments) -> int:
    """Bytes of a piece of logits, or of all where they are fewer."""
    item, b, p = BYTES[args.run.dtype], args.batch, args.parallel
    row = -(-args.model.vocab_size // p.tp) * b.micro_batch * item
    return min(max(row, HEAD), row // b.micro_batch * local_tokens(args))
