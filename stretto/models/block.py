"""One transformer block: attention and feed-forward, each beside a residual, with norms where the config has them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from stretto.arguments.schema import ModelConfig
from stretto.experts import SparseFeedForward
from stretto.experts.run import Run, finish
from stretto.models.attention import Attention
from stretto.models.block_ops import BlockOps
from stretto.models.cache import KeyValues
from stretto.models.halves import Halves
from stretto.models.latent import LatentAttention
from stretto.models.norm import Norm, norm
from stretto.models.once_more import once_more
from stretto.models.rope import Rotation
from stretto.params import Init
from stretto.schedule.blocks import StageBlock
from stretto.streams import Stream
from stretto.structure import Structure
from stretto.tensor_parallel import (
    Build,
    ColumnParallelLinear,
    Dropout,
    Lazy,
    Projection,
    RowParallelLinear,
    WithResidual,
)
from stretto.tensor_parallel.layers import expect


class FeedForward(nn.Module):
    """SwiGLU, GEGLU (Shazeer, "GLU variants improve Transformer", 2020) or GELU: [s(/t), b, h] -> [s(/t), b, h]."""

    def __init__(
        self,
        config: ModelConfig,
        build: Build,
        parts: BlockOps,
        *,
        out_init: Init,
        inner: int | None = None,
        place: str = "",
    ) -> None:
        super().__init__()
        inner, gated = config.dim_ffn if inner is None else inner, config.gated
        held = (
            [Projection("gate_proj", inner), Projection("up_proj", inner)] if gated else [Projection("up_proj", inner)]
        )
        self.activation, self.parts = parts.activation, parts.parts
        self.gate_up_proj = ColumnParallelLinear(
            config.hidden, held, build, bias=config.bias, init=Init(std=config.init_std), place=place
        )
        self.down_proj = RowParallelLinear(
            inner, config.hidden, build, bias=config.bias, init=out_init, name="down_proj", place=place
        )
        self.chunks = build.chunks
        for _ in range(self.chunks - 1):  # each chunk is a use of its own
            for layer in (self.gate_up_proj, self.down_proj):
                expect(layer.weight, build)

    def forward(self, x: Tensor | Lazy, structure: Structure | None = None) -> Tensor:
        if self.chunks == 1:
            return self._now(x, structure)
        if isinstance(x, Lazy):
            raise ValueError("a sequence that is computed once more as a whole cannot be taken in chunks")
        # Inner activations exist of one chunk at a time, forward and back.
        parts = x.tensor_split(self.chunks)
        return torch.cat([once_more(self._now, part) for part in parts])

    def _now(self, x: Tensor | Lazy, structure: Structure | None = None) -> Tensor:
        # What enters the activation goes nowhere else: its gradient may take its place.
        if "projections" not in self.parts:
            out: Tensor = self.down_proj(self.activation(self.gate_up_proj(x, structure)), structure)
        elif "activation" in self.parts:
            out = once_more(lambda x: self.down_proj(self._inner(x, structure), structure), x)
        else:
            out = self.down_proj(once_more(partial(self._inner, structure=structure), x), structure)
        return out

    def _inner(self, x: Tensor | Lazy, structure: Structure | None = None) -> Tensor:
        return self.activation.now(self.gate_up_proj(x, structure))


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

    def forward(
        self,
        x: Tensor | Halves,
        rotations: Rotations | None,
        structure: Structure,
        before: KeyValues | None = None,
    ) -> Tensor | Halves:
        return x.through(self) if isinstance(x, Halves) else finish(self.run(x, rotations, structure, before))

    def run(
        self,
        x: Tensor,
        rotations: Rotations | None,
        structure: Structure,
        before: KeyValues | None = None,
        beside: Stream = Stream(),  # noqa: B008  # frozen
    ) -> Run:
        """The forward, which can be left where experts send."""
        turn = None if rotations is None else rotations.windowed if self.windowed else rotations.whole
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
