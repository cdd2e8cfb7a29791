"""Which blocks are computed in regions (`stretto.models.block_regions`): those hold nothing by local names."""

from __future__ import annotations

from stretto.arguments.schema import Arguments
from stretto.estimate.kept import BLOCK, Parts
from stretto.schedule.blocks import StageBlock


def in_regions(args: Arguments, block: StageBlock, parts: Parts) -> bool:
    """Whether a block is, as far as it is on a stage, that recomputes `parts`."""
    m, tuning = args.model, args.tuning
    if m.parallel_residual or m.dropout or m.bias or parts == BLOCK or "projections" in parts:
        return False
    if block.feed_forward and (m.is_sparse(block.layer) or args.run.ffn_chunks > 1):
        return False
    normed_apart = m.qk_norm and (m.qk_norm_width == "full" or args.parallel.exact or m.position != "rope")
    if block.attention and (m.latent or m.qkv_clip or "attention" in parts or normed_apart):
        return False
    matrices = ("q", "k", "v", "o") * block.attention + ("gate", "up", "down") * block.feed_forward
    return not any(map(tuning.adapts, matrices))
