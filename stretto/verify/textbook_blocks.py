"""The borders that a block enters and leaves, and what of it is communicated once more."""

from __future__ import annotations

from dataclasses import dataclass

from stretto.arguments.schema import Arguments, ModelConfig
from stretto.estimate.kept import BLOCK
from stretto.estimate.recompute import policy_of, policy_of_further
from stretto.models import StageSpec
from stretto.schedule.blocks import StageBlock
from stretto.train.stages import stage_specs
from stretto.verify.textbook_experts import blocks_of


@dataclass(frozen=True)
class Recomputed:
    """What a block communicates once more: borders entered and left, the exchange of attention, norms of heads."""

    entered: float
    left: int
    attention: bool
    heads: bool


def sides(model: ModelConfig, block: StageBlock) -> tuple[float, int]:
    """Borders of a block that are entered, in units of the residual stream, and left."""
    region = block.feed_forward and (not model.is_sparse(block.layer) or model.shared_ffn > 0)
    return _attention_enters(model) * block.attention + region, block.attention + region


def _attention_enters(m: ModelConfig) -> float:
    latents = ((m.kv_lora_rank or 0) + m.dim_rotary + (m.q_lora_rank or 0)) / m.hidden * m.latent
    return (0 if m.q_lora_rank else 1) + latents


def recomputed(args: Arguments, part: StageSpec) -> list[Recomputed]:
    """Of each block of a stage what is communicated once more."""
    m, stage = args.model, next(n for n, each in enumerate(stage_specs(args)) if each == part)
    norms, found = m.norm_placement != "post", []
    policy = (*policy_of(args, stage), *(policy_of_further(args).values() if part.last else ()))
    for block, parts in zip(blocks_of(m, part), policy, strict=True):
        here = block.attention
        if parts == BLOCK:
            found.append(Recomputed(*sides(m, block), attention=here, heads=here))
            continue
        whole, dense = "projections" in parts, block.feed_forward and not m.is_sparse(block.layer)
        entered: float = ("norms" in parts and norms) * ((here and not m.latent) + dense)
        entered += whole * (_attention_enters(m) * here + dense)
        left = whole * (("attention" in parts and here) + ("activation" in parts and dense))
        attention = here and (whole or "attention" in parts)
        found.append(Recomputed(entered, left, attention=attention, heads=whole and here))
    return found
