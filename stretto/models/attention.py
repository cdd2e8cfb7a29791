"""Causal self-attention, heads cut along the tensor-parallel axis; here with grouped queries.

What differs from model to model is where queries, keys and values come from (`heads_of`): here from the residual
stream, in `latent` from latents.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from stretto.arguments.schema import ModelConfig
from stretto.attention import Scores
from stretto.estimate.kept import NOTHING
from stretto.models.block_ops import BlockOps
from stretto.models.cache import KeyValues
from stretto.models.full_norm import FullNorm, full_norms
from stretto.models.norm import HeadNorm, first_weight
from stretto.models.recomputed import recomputed, unkept
from stretto.params import Init, ParamSpec, Shard
from stretto.structure import Structure
from stretto.tensor_parallel import Build, ColumnParallelLinear, Lazy, Projection, RowParallelLinear, declare_on


class SelfAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v per head: [s(/t), b, h] -> [s(/t), b, h].

    `layer` is its number in the whole model: windows may be of some layers only.
    """

    o_proj: RowParallelLinear
    sinks: nn.Parameter | None

    def __init__(self, config: ModelConfig, build: Build, layer: int, parts: BlockOps) -> None:
        super().__init__()
        if config.heads % build.tp.size:
            raise ValueError(f"tp={build.tp.size} must divide heads={config.heads}")
        self.dim, self.heads = config.dim_per_head, config.heads // build.tp.size
        self.build, self.layer, self.scores = build, layer, Scores.of(config, layer)
        self.rotate, self.attend, self.parts = parts.rotate, parts.attend(layer), parts.parts

    def leave(self, config: ModelConfig, build: Build, out_init: Init) -> None:
        """Declare what takes the heads back to the residual stream."""
        self.o_proj = RowParallelLinear(
            config.heads * config.dim_value,
            config.hidden,
            build,
            bias=config.bias,
            init=out_init,
            name="o_proj",
            place=f"model.layers.{self.layer}.self_attn",
        )
        self.sinks = None
        if config.attention_sinks:
            sinks = ParamSpec((config.heads,), Init(std=config.init_std), (Shard("tp", 0),), weight_decay=False)
            self.sinks = declare_on(self, "sinks", sinks, build)

    @abstractmethod
    def heads_of(
        self, x: Tensor | Lazy, rotation: tuple[Tensor, Tensor] | None, structure: Structure
    ) -> Iterable[Tensor]:
        """q [s, b, heads, d], k and v [s, b, kv_heads, d] of this rank's heads."""

    def forward(
        self,
        x: Tensor | Lazy,
        rotation: tuple[Tensor, Tensor] | None,
        structure: Structure,
        before: KeyValues | None = None,
    ) -> Tensor:
        def attended(x: Tensor | Lazy) -> Tensor:
            return self._attended(*self.heads_of(x, rotation, structure), *sinks, structure=structure, before=before)

        sinks = () if self.sinks is None else (self.sinks,)
        again = self.parts if before is None and torch.is_grad_enabled() else NOTHING
        if "projections" in again:
            if "attention" in again:
                return recomputed(lambda x: self.o_proj(attended(x), structure), x)
            out: Tensor = self.o_proj(recomputed(attended, x), structure)
        elif "attention" in again:
            q, k, v = self.heads_of(x, rotation, structure)
            out = self.o_proj(unkept(partial(self._attended, structure=structure), q, k, v, *sinks), structure)
        else:
            out = self.o_proj(attended(x), structure)
        return out

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor, structure: Structure, before: KeyValues | None = None
    ) -> Tensor:
        """[s, b, heads * d]."""
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))  # [b, heads, s, d]
        if before is not None:
            k, v = before.extended(self.layer, k, v)
        y = self.attend(q, k, v, self.scores, structure, sinks[0] if sinks else None).permute(2, 0, 1, 3)
        return y.reshape(*y.shape[:2], -1)


class Attention(SelfAttention):
    """With grouped queries.

    With fewer key/value heads than ranks, consecutive ranks hold the same head and each has a part of its gradient.
    """

    def __init__(self, config: ModelConfig, build: Build, layer: int, parts: BlockOps, *, out_init: Init) -> None:
        super().__init__(config, build, layer, parts)
        tp, d = build.tp, config.dim_per_head
        if max(config.num_kv_heads, tp.size) % min(config.num_kv_heads, tp.size):
            raise ValueError(f"tp={tp.size} must divide or be divided by kv_heads={config.num_kv_heads}")
        self.kv_heads = max(1, config.num_kv_heads // tp.size)
        copies = max(1, tp.size // config.num_kv_heads)
        kv = config.num_kv_heads * d
        self.qkv_proj = ColumnParallelLinear(
            config.hidden,
            [
                Projection("q_proj", config.heads * d, unit=d),
                Projection("k_proj", kv, copies, unit=d),
                Projection("v_proj", kv, copies, unit=d),
            ],
            build,
            bias=config.bias or config.qkv_bias,
            init=Init(std=config.init_std),
            place=f"model.layers.{layer}.self_attn",
        )
        self.leave(config, build, out_init)
        self.clip = config.qkv_clip
        self.over_heads, self.norm_and_rotate = parts.full_norm, parts.norm_and_rotate if self.clip is None else None
        self.q_norm: HeadNorm | FullNorm | None = None
        self.k_norm: HeadNorm | FullNorm | None = None
        if config.qk_norm and config.qk_norm_width == "full":
            self.q_norm = FullNorm(config.heads, d, config.norm_eps, build)
            self.k_norm = FullNorm(config.num_kv_heads, d, config.norm_eps, build, copies=copies)
        elif config.qk_norm:
            self.q_norm = HeadNorm(d, parts.head_norm, build, init=first_weight(config))
            self.k_norm = HeadNorm(d, parts.head_norm, build, init=first_weight(config))

    def heads_of(
        self, x: Tensor | Lazy, rotation: tuple[Tensor, Tensor] | None, structure: Structure
    ) -> Iterable[Tensor]:
        """As `SelfAttention`."""
        qkv = self.qkv_proj(x, structure)
        qkv = qkv.view(*qkv.shape[:2], -1, self.dim)  # all of them side by side
        if self.q_norm is None:
            qkv = self._clipped(qkv)
            if rotation is not None:
                return self.rotate(qkv, rotation, self.heads, self.kv_heads, rest=self.kv_heads)
        q, k, v = qkv.split_with_sizes([self.heads, self.kv_heads, self.kv_heads], dim=2)
        if isinstance(self.q_norm, FullNorm) and isinstance(self.k_norm, FullNorm):
            q, k = full_norms(self.q_norm, self.k_norm, q, k, self.build, self.over_heads)
        elif isinstance(self.q_norm, HeadNorm) and isinstance(self.k_norm, HeadNorm):
            if rotation is not None and self.norm_and_rotate is not None:
                return self.norm_and_rotate(qkv, self.q_norm.weight, self.k_norm.weight, rotation, self.heads)
            q, k = self.q_norm(q), self.k_norm(k)
        if self.q_norm is not None:
            q, k, v = self._clipped(q), self._clipped(k), self._clipped(v)
        if rotation is not None:
            (q,), (k,) = self.rotate(q, rotation, self.heads), self.rotate(k, rotation, self.kv_heads)
        return q, k, v

    def _clipped(self, x: Tensor) -> Tensor:
        return x if self.clip is None else x.clamp(-self.clip, self.clip)
