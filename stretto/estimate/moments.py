"""The moments of a step in which a rank may hold most: a peak is the largest of them, not a sum of what each needs.

At each, the microbatches in flight keep what they need for their backwards, and one of them is somewhere: forward in a
layer, in the head, back in a layer, in the embedding. What is kept of that one grows and shrinks layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from stretto.arguments.schema import Arguments
from stretto.estimate.block_tape import BlockMoments, block_moments
from stretto.estimate.blocks import alike, first_of_kinds, moments_of, uncut
from stretto.estimate.kept import BLOCK
from stretto.estimate.logits import logits, of_tokens
from stretto.estimate.memo import Memo
from stretto.estimate.recompute import policy_of, policy_of_further
from stretto.estimate.sizes import BYTES, entering_bytes, in_halves, joined_bytes, local_tokens
from stretto.estimate.stages import stage_blocks
from stretto.schedule.blocks import StageBlock


class StageMoment(NamedTuple):
    """Of one microbatch in a stage."""

    name: str
    kept: int
    """What it keeps for its backward, of the layers before."""
    working: int
    """What else lives."""
    section: int
    """Which section of the stage is at work."""
    back: bool
    """Whether the section before is gathered next."""
    fills: bool
    """Whether gradients fill."""


@dataclass(frozen=True)
class StageActivations:
    """What a microbatch needs of a rank in one stage."""

    kept: int
    """Between its forward and its backward."""
    moments: tuple[StageMoment, ...]
    """While one of them goes on."""


def stage_activations(args: Arguments, stage: int, memo: Memo | None = None) -> StageActivations:
    """Of a stage. Where a block's input waits in the host's memory, that of the last and of one before it are here.

    Blocks of runs that are cut into other stages are alike: they are looked up in a planner's `memo`.
    """
    layers, memo = stage_blocks(args), memo or Memo()
    first, last, away = stage == 0, stage == len(layers) - 1, args.run.recompute == "offload"
    blocks = list(_blocks(args, stage, memo))
    x = entering_bytes(args)
    whole = x * (args.parallel.tp if args.parallel.sequence_parallel else 1)
    further = sum(_further(args)) if last else 0
    # Which rows the embedding has looked up, as int64 beside a mask.
    looked_up = 9 * local_tokens(args) * first
    used, both = _angles(args, stage, memo)
    # Halves are copies of the whole, which lives on while they go forward.
    entered = x * in_halves(args, layers[stage])
    always = used + looked_up
    found, kept, at = list[StageMoment](), always, int(first)
    for n, block in enumerate(blocks):
        coming = min(n, 1) * x
        for back, moment in ((False, block.forward), (True, block.backward)):
            before = always + coming * back if away else kept
            working = moment.bytes + (both - used + entered) * (not back)
            found.append(StageMoment(moment.name, before, working, at + n, back, back))
        kept = always + block.kept if away else kept + block.kept
    end = at + len(blocks)
    if last:  # the normed stream, its gradient and a piece of logits, beside what the norm keeps
        normed = whole + (x if whole > x else 0)
        found.append(
            StageMoment("head", kept + further + x, normed + whole + logits(args) + of_tokens(args), end, False, True)
        )
        kept += further + x + whole
    if first and args.tuning.trains("model.embed_tokens.weight"):
        found.append(StageMoment("backward of the embedding", always, x + _embedding(args, whole), 0, True, True))
    if not found:  # a stage without layers passes on what comes
        found.append(StageMoment("passing on", 0, x, 0, False, False))
    return StageActivations(kept, tuple(found))


def _blocks(args: Arguments, stage: int, memo: Memo) -> Iterator[BlockMoments]:
    held = stage_blocks(args)[stage]
    halves, alone = in_halves(args, held), memo(uncut, args)
    kinds = memo(first_of_kinds, alone)
    for block, parts in zip(held, policy_of(args, stage, memo), strict=True):
        first = halves and block == held[0]
        yield memo(moments_of, alone, alike(block, kinds), parts, halves, first)


def _angles(args: Arguments, stage: int, memo: Memo) -> tuple[int, int]:
    """Cosines and sines of a microbatch's tokens, where they are not a piece of the table: those that rotations keep,
    and with a window and without."""
    b, m, cut = args.batch, args.model, args.parallel.cp > 1 or args.data.packing
    tokens = local_tokens(args) if args.data.packing else local_tokens(args) // b.micro_batch
    one = 2 * tokens * m.dim_rotary * BYTES[args.run.dtype] * (cut and m.position == "rope")
    again = any(parts == BLOCK for parts in policy_of(args, stage, memo))  # blocks are given both
    windows = {m.window_of(block.layer) is None for block in stage_blocks(args)[stage] if block.attention}
    kinds = 2 if again else len(windows)
    return kinds * one, 2 * one


def _further(args: Arguments) -> Iterator[int]:
    """What each layer that predicts a further token keeps."""
    for layer, parts in policy_of_further(args).items():
        yield block_moments(args, StageBlock(layer), parts).kept + joined_bytes(args)


def _embedding(args: Arguments, whole: int) -> int:
    """Of the embedding's backward: the gradient in fp32 or wider, and rows of the vocabulary that it adds up to."""
    item = BYTES[args.run.dtype]
    wide = max(4, item)
    rows = -(-args.model.vocab_size // args.parallel.tp) * args.model.hidden * wide
    return rows + (whole // item * wide if wide > item else 0)
