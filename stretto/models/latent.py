"""Multi-head latent attention (DeepSeek-AI, "DeepSeek-V2", 2024): queries, keys and values of all heads from latents.

    [q latent, kv latent, k rotated] = x W       every rank computes all of it, of its part of the sequence
    q_i = [q latent W_i, rotated q latent W'_i]  per head i, of the heads of this rank
    k_i = [kv latent U_i, k rotated],  v_i = kv latent V_i

All three enter the tensor-parallel region together and once: under sequence parallelism what is gathered is the
latents, a fraction of the residual stream. Their norms, and the rotated key that all heads share, lie inside: each
rank has the part of their gradients that its own heads make.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from stretto.arguments.schema import ModelConfig
from stretto.models.attention import SelfAttention
from stretto.models.block_ops import BlockOps
from stretto.models.norm import LatentNorm, first_weight
from stretto.params import Init
from stretto.structure import Structure
from stretto.tensor_parallel import Build, ColumnParallelLinear, Lazy, Projection, declare_on, enter, replicated
from stretto.tensor_parallel.layers import expect_gemms
from stretto.tensor_parallel.linear import linear


class LatentAttention(SelfAttention):
    """Without a latent of the queries these come from the residual stream, as those of other attention do."""

    def __init__(self, config: ModelConfig, build: Build, layer: int, parts: BlockOps, *, out_init: Init) -> None:
        super().__init__(config, build, layer, parts)
        h, init, kv = config.hidden, Init(std=config.init_std), config.kv_lora_rank
        if kv is None:
            raise ValueError("kv_lora_rank is unset: there is no latent")
        self.rotated, self.value = config.dim_rotary, config.dim_value
        # The halves of a single pair are neighbours: to reorder it would only make a view, and rotation is in place.
        self.interleaved = config.rope_interleaved and self.rotated > 2
        self.plain = self.dim - self.rotated
        latents = [Projection("kv_a_proj_with_mqa", kv + self.rotated)]
        if config.q_lora_rank is not None:
            latents.insert(0, Projection("q_a_proj", config.q_lora_rank))
        self.latents = [*([config.q_lora_rank] if config.q_lora_rank else []), kv, self.rotated]
        self.latent_proj = Latents(h, latents, build, init)
        first = first_weight(config)
        queries = config.heads * self.dim
        self.q_proj: ColumnParallelLinear | None = None
        if config.q_lora_rank is None:
            self.q_proj = ColumnParallelLinear(
                h,
                [Projection("q_proj", queries)],
                build,
                bias=False,
                init=init,
                place=f"model.layers.{layer}.self_attn",
            )
        else:
            self.q_a_layernorm = LatentNorm(config.q_lora_rank, parts.latent_norm, build, init=first)
            self.q_b_proj = ColumnParallelLinear(config.q_lora_rank, queries, build, bias=False, init=init, inside=True)
        self.kv_a_layernorm = LatentNorm(kv, parts.latent_norm, build, init=first)
        rows = config.heads * (self.plain + self.value)
        self.kv_b_proj = ColumnParallelLinear(kv, rows, build, bias=False, init=init, inside=True)
        self.leave(config, build, out_init)

    def heads_of(
        self, x: Tensor | Lazy, rotation: tuple[Tensor, Tensor] | None, structure: Structure
    ) -> Iterable[Tensor]:
        """As `SelfAttention`."""
        b = self.build
        low = enter(self.latent_proj(x), b.tp, sequence_parallel=b.sequence_parallel, overlap_with=b.overlap_with)
        *latents, k_rotated = low.split_with_sizes(self.latents, -1)
        q = self.q_proj(x, structure) if self.q_proj is not None else self.q_b_proj(self.q_a_layernorm(latents[0]))
        kv = self.kv_b_proj(self.kv_a_layernorm(latents[-1]))
        q, kv = (t.view(*t.shape[:2], self.heads, -1) for t in (q, kv))
        q_plain, q_rotated = q.split_with_sizes([self.plain, self.rotated], -1)
        k_plain, v = kv.split_with_sizes([self.plain, self.value], -1)
        q_rotated, k_rotated = self._rotated(q_rotated, rotation), self._rotated(k_rotated.unsqueeze(2), rotation)
        k_rotated = k_rotated.expand(-1, -1, self.heads, -1)
        return torch.cat([q_plain, q_rotated], -1), torch.cat([k_plain, k_rotated], -1), v

    def _rotated(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """x [s, b, heads, r] turned by the angle of its position; neighbours end up a half apart, everywhere."""
        pairs = x.reshape(*x.shape[:-1], -1, 2).transpose(-1, -2).flatten(-2) if self.interleaved else x.clone()
        return pairs if rotation is None else self.rotate(pairs, rotation, x.shape[2])[0]


class Latents(nn.Module):
    """What every tensor-parallel rank computes whole, of its part of the sequence: [s(/t), b, h] -> [s(/t), b, n]."""

    def __init__(self, hidden: int, parts: list[Projection], build: Build, init: Init) -> None:
        super().__init__()
        sp = build.sequence_parallel
        specs = [
            replicated((p.d_out, hidden), init, sequence_parallel=sp, weight_decay=True, part=p.name) for p in parts
        ]
        self.alone = build.alone
        self.weight = declare_on(self, "weight", specs, build)
        expect_gemms(self.weight, build)

    def forward(self, x: Tensor | Lazy) -> Tensor:
        return linear(x, self.weight, None, self.alone, column=True)
