"""Learned position embeddings."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn
from torch.nn import functional as F

from stretto.arguments.schema import ModelConfig
from stretto.params import Init
from stretto.structure import Structure
from stretto.tensor_parallel import Build, declare_on, replicated


class Positions(nn.Module):
    """Learned position embeddings, added to [s(/t), b, h]. Raises ValueError for more positions than were learned."""

    def __init__(self, config: ModelConfig, build: Build, seq_len: int) -> None:
        super().__init__()
        sp = build.sequence_parallel
        self.rank = build.tp.rank if sp else 0
        init = Init(std=config.init_std)
        spec = replicated(
            (config.learned_positions or seq_len, config.hidden), init, sequence_parallel=sp, weight_decay=True
        )
        self.weight = declare_on(self, "weight", replace(spec, elementwise=True), build)

    def forward(self, x: Tensor, structure: Structure) -> Tensor:
        learned = self.weight.shape[0]
        if structure.length > learned:
            raise ValueError(f"{structure.length} tokens, but positions were learned for {learned}")
        if structure.plain:
            first = structure.first + self.rank * x.shape[0]
            return x + self.weight[first : first + x.shape[0], None, :]
        return x + F.embedding(structure.positions_of(self.rank, x.shape[0], x.device), self.weight)
