"""One transformer block: attention and feed-forward, each beside a residual, with norms where the config has them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from stretto.arguments.schema import ModelConfig
from stretto.experts import SparseFeedForward
from stretto.experts.run import Run, finish
from stretto.models.attention import Attention
from stretto.models.block_ops import BlockOps
from stretto.models.block_regions import regions_of
from stretto.models.cache import KeyValues
from stretto.models.feed_forward import FeedForward
from stretto.models.halves import Halves
from stretto.models.latent import LatentAttention
from stretto.models.norm import Norm, norm
from stretto.models.rope import Rotation
from stretto.params import Init
from stretto.schedule.blocks import StageBlock
from stretto.streams import Stream
from stretto.structure import Structure
from stretto.tensor_parallel import (
    Build,
    Dropout,
    WithResidual,
)


@dataclass(frozen=True)
class Rotations:
    """Angles of the layers without a window, and of those with one."""

    whole: Rotation
    windowed: Rotation

    def at(self, structure: Structure) -> Rotations:
        """Those of the tokens that are here."""
        if not structure.plain:
            positions = structure.positions_of(0, structure.slots, self.whole[0].device)  # [n, b or 1]
            return Rotations(*((cos[positions, 0], sin[positions, 0]) for cos, sin in (self.whole, self.windowed)))
        if not structure.first:
            return self
        return Rotations(
            *((cos[structure.first :], sin[structure.first :]) for cos, sin in (self.whole, self.windowed))
        )


class Block(nn.Module):
    """A residual block of the whole model, as far as it is on this stage, [s(/t), b, h] -> [s(/t), b, h].

    Dropout is on what adds to the residual, as in GPT-2. Norms are
    named as in the Hugging Face model that has them in the same places: Llama, OLMo 2 (after), Gemma 2 (both).
    """

    def __init__(self, config: ModelConfig, build: Build, block: StageBlock, parts: BlockOps) -> None:
        super().__init__()
        if config.parallel_residual and not block.whole:
            raise ValueError(f"block {block.layer}: attention and feed-forward of a parallel residual are on one stage")
        # Radford et al. (GPT-2, 2019): what adds to the residual starts smaller by 1/sqrt(number of additions).
        out_init = Init(std=config.init_std / (2 * config.layers) ** 0.5)
        before, after = config.norm_placement != "post", config.norm_placement != "pre"
        self.layer = layer = block.layer
        name, first, second = f"model.layers.{layer}", block.attention, block.feed_forward
        self.windowed, self.parallel = config.window_of(layer) is not None, config.parallel_residual

        sparse = config.is_sparse(layer)

        def normed(wanted: bool, taken: bool = True) -> Norm | None:
            # What several read is kept: the router and the exchange of tokens, or latents and queries without one.
            op = parts.norm if taken else replace(parts.norm, recompute=False)
            return norm(config, build, op) if wanted else None

        self.input_layernorm = normed(before and first, not config.latent or config.q_lora_rank is not None)
        attention = LatentAttention if config.latent else Attention
        self.self_attn = attention(config, build, layer, parts, out_init=out_init) if first else None
        # Before the feed-forward, or after attention: of that it has its name.
        self.post_attention_layernorm = normed(first if after else second, not sparse or after)
        self.pre_feedforward_layernorm = normed(before and after and second, not sparse)
        self.mlp: SparseFeedForward | FeedForward | None = None
        if second and sparse:
            shared = partial(FeedForward, config, build, parts, out_init=out_init, place=f"{name}.mlp.shared_experts")
            self.mlp = SparseFeedForward(
                config, build, parts.activation, lambda inner: shared(inner=inner), out_init=out_init
            )
        elif second:
            self.mlp = FeedForward(config, build, parts, out_init=out_init, place=f"{name}.mlp")
        self.post_feedforward_layernorm = normed(after and second)
        self._norms = (
            (self.input_layernorm, self.post_attention_layernorm if after else None),
            (
                self.pre_feedforward_layernorm if after else self.post_attention_layernorm,
                self.post_feedforward_layernorm,
            ),
        )
        self.attn_dropout = Dropout(config.dropout, f"{name}.self_attn", build)
        self.mlp_dropout = Dropout(config.dropout, f"{name}.mlp", build)
        apart = self.parallel or config.dropout
        rotates = config.position == "rope"
        self._regions = None if apart else regions_of(self.self_attn, self.mlp, self._norms, build, rotates=rotates)

    def forward(
        self,
        x: Tensor | Halves,
        rotations: Rotations | None,
        structure: Structure,
        before: KeyValues | None = None,
    ) -> Tensor | Halves:
        if isinstance(x, Halves):
            return x.through(self)
        if self._regions is not None and before is None and self._regions.take(x):
            return self._regions(x, self._turn(rotations), structure)
        return finish(self.run(x, rotations, structure, before))

    def _turn(self, rotations: Rotations | None) -> Rotation | None:
        return None if rotations is None else rotations.windowed if self.windowed else rotations.whole

    def run(
        self,
        x: Tensor,
        rotations: Rotations | None,
        structure: Structure,
        before: KeyValues | None = None,
        beside: Stream = Stream(),  # noqa: B008  # frozen
    ) -> Run:
        """The forward, which can be left where experts send."""
        turn = self._turn(rotations)
        (before_attention, after_attention), (before_mlp, after_mlp) = self._norms
        if self.self_attn is None:  # x is what it has left
            enters = _normed(x, before_mlp)
        else:
            enters = _normed(x, before_attention)
            added = _left(self.self_attn(enters.output, turn, structure, before), after_attention)
            if self.attn_dropout.p:
                added = self.attn_dropout(added, structure)
            past = enters.residual  # known when the sublayer has taken the output
            if self.mlp is None:
                mid: Tensor = past + added
                return mid
            enters = _normed(x if self.parallel else past + added, before_mlp)
        if isinstance(self.mlp, SparseFeedForward):
            assert isinstance(enters.output, Tensor)
            more = yield from self.mlp.run(enters.output, structure, beside)
        else:
            assert self.mlp is not None
            more = self.mlp(enters.output, structure)
        more = _left(more, after_mlp)
        if self.mlp_dropout.p:
            more = self.mlp_dropout(more, structure)
        out: Tensor = (past + added if self.parallel else enters.residual) + more
        return out


def _normed(x: Tensor, norm: Norm | None) -> WithResidual:
    """What a sublayer takes, and the way past it."""
    return WithResidual(x, x) if norm is None else norm(x)


def _left(added: Tensor, norm: Norm | None) -> Tensor:
    """What a sublayer adds to the residual."""
    return added if norm is None else norm.now(added)
