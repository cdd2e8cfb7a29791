"""The moments of a step in which a rank may hold most: a peak is the largest of them, not a sum of what each needs.

At each, the microbatches under way keep what they need for their backwards, and one of them is somewhere: forward in a
layer, in the head, back in a layer, in the embedding. What is kept of that one grows and shrinks layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from stretto.arguments.schema import Arguments
from stretto.arguments.trained import is_trained
from stretto.estimate.block_tape import BlockMoments, block_moments
from stretto.estimate.context import comm_of
from stretto.estimate.kept import Parts
from stretto.estimate.recompute import policy_of, policy_of_further
from stretto.estimate.sizes import BYTES, entering_bytes, in_flight, joined_bytes
from stretto.estimate.stages import stage_layers
from stretto.estimate.transient import logits


class StageMoment(NamedTuple):
    """Of a stage, without what stays through the step."""

    name: str
    held: int
    """What all microbatches under way keep for their backwards."""
    working: int
    """What else lives."""
    section: int
    """Which section of the stage is at work."""
    back: bool
    """Whether gradients fill."""

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.held + self.working


def stage_moments(args: Arguments, stage: int) -> list[StageMoment]:
    """All that may be the peak of a stage."""
    return list(_moments(args, stage))


def _moments(args: Arguments, stage: int) -> Iterator[StageMoment]:
    layers = stage_layers(args)
    first, last = stage == 0, stage == len(layers) - 1
    blocks = list(_blocks(args, stage))
    x = entering_bytes(args)
    whole = x * (args.parallel.tp if args.parallel.sequence_parallel else 1)
    further = 0
    if last:
        further = sum(block_moments(args, n, p).kept + joined_bytes(args) for n, p in policy_of_further(args).items())
    kept = sum(block.kept for block in blocks)
    # The last stage keeps what leaves its last block, and the gradient that the head has made of it.
    others = (in_flight(args, stage) - 1) * (kept + (x + whole + further) * last)
    before, at = others, int(first)
    for n, block in enumerate(blocks):
        for back, moment in ((False, block.forward), (True, block.backward)):
            yield StageMoment(moment.name, before, moment.bytes, at + n, back)
        before += block.kept
    at += len(blocks)
    if last:
        normed = whole + (x if whole > x else 0)
        yield StageMoment("head", before + further + x, normed + whole + logits(args), at, True)
    if first and is_trained("model.embed_tokens.weight", args.tuning):
        wide = max(4, BYTES[args.run.dtype])
        rows = -(-args.model.vocab_size // args.parallel.tp) * args.model.hidden * wide
        widened = whole * wide // BYTES[args.run.dtype] * (wide > BYTES[args.run.dtype])
        yield StageMoment("backward of the embedding", others, x + widened + rows, 0, True)


def _blocks(args: Arguments, stage: int) -> Iterator[BlockMoments]:
    known: dict[tuple[bool, str, Parts], BlockMoments] = {}
    for layer, parts in zip(stage_layers(args)[stage], policy_of(args, stage), strict=True):
        kind = args.model.is_sparse(layer), comm_of(args, layer) if args.parallel.cp > 1 else "", parts
        if kind not in known:
            known[kind] = block_moments(args, layer, parts)
        yield known[kind]
