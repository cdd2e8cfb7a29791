"""What of a model's blocks a pipeline stage holds: whole ones, and at its ends perhaps one sublayer of a block.

A block is two residual sublayers, x + attention(norm(x)) and then x + feed_forward(norm(x)), and what leaves the first
has the shape of what leaves the second: a boundary of stages may lie between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from functools import cache
from typing import NamedTuple


class Sublayers(Enum):
    """Those of one block that are on a stage."""

    BOTH = "block"
    ATTENTION = "attention"
    FEED_FORWARD = "feed-forward"


class StageBlock(NamedTuple):
    """A block, as far as it is on a stage; `layer` is its global number."""

    layer: int
    sublayers: Sublayers = Sublayers.BOTH

    @property
    def attention(self) -> bool:
        """Whether its attention is here."""
        return self.sublayers is not Sublayers.FEED_FORWARD

    @property
    def feed_forward(self) -> bool:
        """Whether its feed-forward is here."""
        return self.sublayers is not Sublayers.ATTENTION

    @property
    def whole(self) -> bool:
        """Whether both are."""
        return self.sublayers is Sublayers.BOTH


StageBlocks = tuple[StageBlock, ...]
"""Of one stage, in the order of the forward."""


@cache
def blocks_of(counts: tuple[float, ...]) -> tuple[StageBlocks, ...]:
    """The blocks of each stage, from how many layers each holds, in halves: `(1.5, 0.5)` is a block and the attention
    of the next, then its feed-forward. Each sublayer is on one stage, in order. ValueError for other fractions."""
    stages, at = [], 0
    for count in counts:
        if count < 0 or (2 * count) % 1:
            raise ValueError(f"a stage cannot hold {count:g} layers: they come whole, or in halves")
        end = at + int(2 * count)
        stages.append(tuple(_block(n, at, end) for n in range(at // 2, (end + 1) // 2)) if end > at else ())
        at = end
    return tuple(stages)


def _block(layer: int, start: int, end: int) -> StageBlock:
    """As far as it lies between two sublayers of the model."""
    if start > 2 * layer:
        return StageBlock(layer, Sublayers.FEED_FORWARD)
    return StageBlock(layer, Sublayers.ATTENTION if end < 2 * layer + 2 else Sublayers.BOTH)


def amounts(counts: Sequence[float], attention: float) -> list[float]:
    """What each stage has of layers, in layers, where attention is such a share of one."""
    shares = {(True, True): 1.0, (True, False): attention, (False, True): 1.0 - attention}
    return [sum(shares[each.attention, each.feed_forward] for each in held) for held in blocks_of(tuple(counts))]


def cut_layers(counts: Sequence[float]) -> tuple[int, ...]:
    """The layers whose sublayers are on two stages, by number."""
    held = (block for blocks in blocks_of(tuple(counts)) for block in blocks)
    return tuple(block.layer for block in held if block.sublayers is Sublayers.ATTENTION)


def counts_text(counts: Sequence[float]) -> str:
    """As `--stage-layers` takes it: `4.5,3.5`."""
    return ",".join(f"{count:g}" for count in counts)


def blocks_text(blocks: StageBlocks) -> str:
    """`0..3, attention of 4`; `none` of an empty stage."""
    whole = [block.layer for block in blocks if block.whole]
    said = [f"{whole[0]}..{whole[-1]}" if len(whole) > 1 else str(whole[0])] if whole else []
    before = [f"feed-forward of {b.layer}" for b in blocks if b.sublayers is Sublayers.FEED_FORWARD]
    after = [f"attention of {b.layer}" for b in blocks if b.sublayers is Sublayers.ATTENTION]
    return ", ".join([*before, *said, *after]) or "none"
