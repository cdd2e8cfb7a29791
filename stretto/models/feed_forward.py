"""Dense feed-forward: two GEMMs with an activation between."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from stretto.arguments.schema import ModelConfig
from stretto.models.block_ops import BlockOps
from stretto.models.recomputed import recomputed
from stretto.params import Init
from stretto.structure import Structure
from stretto.tensor_parallel import Build, ColumnParallelLinear, Lazy, Projection, RowParallelLinear
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
            raise ValueError("a sequence that is recomputed as a whole cannot be taken in chunks")
        # Inner activations exist of one chunk at a time, forward and back.
        parts = x.tensor_split(self.chunks)
        return torch.cat([recomputed(self._now, part) for part in parts])

    def _now(self, x: Tensor | Lazy, structure: Structure | None = None) -> Tensor:
        # What enters the activation goes nowhere else: its gradient may take its place.
        if "projections" not in self.parts:
            out: Tensor = self.down_proj(self.activation(self.gate_up_proj(x, structure)), structure)
        elif "activation" in self.parts:
            out = recomputed(lambda x: self.down_proj(self._inner(x, structure), structure), x)
        else:
            out = self.down_proj(recomputed(partial(self._inner, structure=structure), x), structure)
        return out

    def _inner(self, x: Tensor | Lazy, structure: Structure | None = None) -> Tensor:
        return self.activation.now(self.gate_up_proj(x, structure))
