"""One transformer block: norm, attention, norm, feed-forward, each around a residual."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from stretto.arguments.schema import ModelConfig
from stretto.models.attention import Attention
from stretto.params import Init
from stretto.tensor_parallel import Build, ColumnParallelLinear, Dropout, Part, RowParallelLinear, declare_norm


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, "GLU variants improve Transformer", 2020) or GELU: [s(/t), b, h] -> [s(/t), b, h]."""

    def __init__(self, config: ModelConfig, build: Build, *, out_init: Init) -> None:
        super().__init__()
        inner, gated = config.dim_ffn, config.activation == "swiglu"
        parts = [Part("gate_proj", inner), Part("up_proj", inner)] if gated else [Part("up_proj", inner)]
        self.gated = gated
        self.gate_up_proj = ColumnParallelLinear(
            config.hidden, parts, build, bias=config.bias, init=Init(std=config.init_std)
        )
        self.down_proj = RowParallelLinear(inner, config.hidden, build, bias=config.bias, init=out_init)

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate_up_proj(x)
        if self.gated:
            gate, up = y.chunk(2, -1)
            y = F.silu(gate) * up
        else:
            y = F.gelu(y, approximate="tanh")
        out: Tensor = self.down_proj(y)
        return out


class Block(nn.Module):
    """Pre-norm residual block, [s(/t), b, h] -> [s(/t), b, h]; `name` is its own in the whole model.

    Dropout is on what adds to the residual, as in GPT-2; `samples` [b] are the rows' numbers in the run.
    """

    def __init__(self, config: ModelConfig, build: Build, name: str) -> None:
        super().__init__()
        # Radford et al. (GPT-2, 2019): what adds to the residual starts smaller by 1/sqrt(number of additions).
        out_init = Init(std=config.init_std / (2 * config.layers) ** 0.5)
        self.input_layernorm = norm(config, build)
        self.self_attn = Attention(config, build, out_init=out_init)
        self.post_attention_layernorm = norm(config, build)
        self.mlp = FeedForward(config, build, out_init=out_init)
        self.attn_dropout = Dropout(config.dropout, f"{name}.self_attn", build)
        self.mlp_dropout = Dropout(config.dropout, f"{name}.mlp", build)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, samples: Tensor | None = None) -> Tensor:
        x = x + self.attn_dropout(self.self_attn(self.input_layernorm(x), rotation), samples)
        out: Tensor = x + self.mlp_dropout(self.mlp(self.post_attention_layernorm(x)), samples)
        return out


def norm(config: ModelConfig, build: Build) -> nn.Module:
    """The norm that the config names, over the hidden dimension."""
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    made: nn.Module = kind(config.hidden, eps=config.norm_eps, dtype=build.dtype, device=build.device)
    return declare_norm(made, sequence_parallel=build.sequence_parallel)
