"""One transformer block: norm, attention, norm, feed-forward, each around a residual."""

from __future__ import annotations

from torch import Tensor, nn

from stretto.arguments.schema import ModelConfig
from stretto.models.attention import Attention
from stretto.models.block_ops import BlockOps
from stretto.models.norm import norm
from stretto.params import Init
from stretto.tensor_parallel import (
    Build,
    ColumnParallelLinear,
    Dropout,
    Lazy,
    Projection,
    RowParallelLinear,
    WithResidual,
)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, "GLU variants improve Transformer", 2020) or GELU: [s(/t), b, h] -> [s(/t), b, h]."""

    def __init__(self, config: ModelConfig, build: Build, parts: BlockOps, *, out_init: Init) -> None:
        super().__init__()
        inner, gated = config.dim_ffn, config.activation == "swiglu"
        held = (
            [Projection("gate_proj", inner), Projection("up_proj", inner)] if gated else [Projection("up_proj", inner)]
        )
        self.activation = parts.activation
        self.gate_up_proj = ColumnParallelLinear(
            config.hidden, held, build, bias=config.bias, init=Init(std=config.init_std)
        )
        self.down_proj = RowParallelLinear(inner, config.hidden, build, bias=config.bias, init=out_init)

    def forward(self, x: Tensor | Lazy) -> Tensor:
        # What enters the activation goes nowhere else: its gradient may take its place.
        out: Tensor = self.down_proj(self.activation(self.gate_up_proj(x)))
        return out


class Block(nn.Module):
    """Pre-norm residual block, [s(/t), b, h] -> [s(/t), b, h]; `name` is its own in the whole model.

    Dropout is on what adds to the residual, as in GPT-2; `samples` [b] are the rows' numbers in the run.
    """

    def __init__(self, config: ModelConfig, build: Build, name: str, parts: BlockOps) -> None:
        super().__init__()
        # Radford et al. (GPT-2, 2019): what adds to the residual starts smaller by 1/sqrt(number of additions).
        out_init = Init(std=config.init_std / (2 * config.layers) ** 0.5)
        self.input_layernorm = norm(config, build, parts.norm)
        self.self_attn = Attention(config, build, parts, out_init=out_init)
        self.post_attention_layernorm = norm(config, build, parts.norm)
        self.mlp = FeedForward(config, build, parts, out_init=out_init)
        self.attn_dropout = Dropout(config.dropout, f"{name}.self_attn", build)
        self.mlp_dropout = Dropout(config.dropout, f"{name}.mlp", build)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, samples: Tensor | None = None) -> Tensor:
        normed: WithResidual = self.input_layernorm(x)
        added = self.attn_dropout(self.self_attn(normed.output, rotation), samples)
        normed = self.post_attention_layernorm(normed.residual + added)
        added = self.mlp_dropout(self.mlp(normed.output), samples)
        out: Tensor = normed.residual + added
        return out
