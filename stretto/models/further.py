"""Multi-token prediction (DeepSeek-AI, "DeepSeek-V3", 2024, section 2.2): layers that predict further tokens.

    x = [norm(Emb(t[i+n])), norm(h[n-1, i])] W        h[0]: what the head of the model reads
    h[n, i] = norm(Block(x)),    loss n: that of t[i+n+1], by the model's own head

There is one block for each n = 1..D, behind the last layer and on its stage. Embedding and head are those of the model.
To its loss is added mtp_loss / D times the sum of theirs, all divided by the tokens that the model itself predicts. The
names, the order of the halves of W and the norms are those of the published weights, `model.layers.61.*`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from stretto.arguments.schema import ModelConfig
from stretto.batch import Batch
from stretto.models.block import Block, Rotations
from stretto.models.block_ops import BlockOps
from stretto.models.latent import Latents
from stretto.models.norm import norm
from stretto.params import Init
from stretto.schedule.blocks import StageBlock
from stretto.structure import Structure
from stretto.tensor_parallel import Build, Projection


class FurtherBlock(Block):
    """Block `layer`, one behind the last, and what joins a token to come to the stream that enters it."""

    def __init__(self, config: ModelConfig, build: Build, layer: int, parts: BlockOps) -> None:
        super().__init__(config, build, StageBlock(layer), parts)
        kept = replace(parts.norm, recompute=False)
        self.enorm, self.hnorm = (norm(config, build, kept) for _ in range(2))
        # Every tensor-parallel rank computes all of it, of its part of the sequence.
        self.join = Latents(2 * config.hidden, [Projection("eh_proj", config.hidden)], build, Init(std=config.init_std))
        last = norm(config, build, kept)
        self.shared_head = nn.ModuleDict({"norm": last})
        self._last = last.now

    def further(self, x: Tensor, embedded: Tensor, rotations: Rotations | None, structure: Structure) -> Tensor:
        """What predicts one token further than `x` does, [s(/t), b, h], with the token between, `embedded` likewise."""
        joined = self.join(torch.cat([self.enorm.now(embedded), self.hnorm.now(x)], -1))
        return self._last(self(joined, rotations, structure))


def shifted(batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each n: the tokens that are read [b, s], those that are to be predicted, and which of these count."""
    assert batch.further is not None
    read = batch.labels
    for said in batch.further.unbind(1):
        counts = said >= 0
        wanted = torch.where(counts, said, ~said)
        yield read, wanted, counts
        read = wanted
