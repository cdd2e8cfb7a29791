"""How many parameters a model has, from its config."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

from stretto.arguments.schema import ModelConfig
from stretto.estimate.attention import attention_matrices, latent_norms
from stretto.schedule.blocks import StageBlock


@dataclass(frozen=True)
class Parameters:
    """Parameters of one process's whole model, vocabulary unpadded."""

    layers: int
    """Blocks."""
    layer: int
    """One block; of a model with experts, a dense one."""
    attention: int
    """Its attention, with the norms of that sublayer."""
    embedding: int
    """Token and position embeddings."""
    final_norm: int
    head: int
    """The output head; 0 when it is tied to the embedding."""
    sparse: int = 0
    """Blocks with experts."""
    sparse_layer: int = 0
    """One of these."""
    expert: int = 0
    """One routed expert."""
    idle: int = 0
    """What of it a token does not go through: the experts that it is not sent to."""
    further: int = 0
    """What predicts further tokens: blocks behind the last, and what leads into and out of them."""
    further_sparse: int = 0
    """Those of these blocks that have experts."""

    @property
    def total(self) -> int:
        """All of them."""
        return self._blocks(self.sparse_layer) + self.embedding + self.final_norm + self.head + self.further

    @property
    def active(self) -> int:
        """What one token goes through."""
        return self.total - (self.sparse + self.further_sparse) * self.idle

    def held(self, blocks: Iterable[StageBlock], sparse: Callable[[int], bool]) -> int:
        """Those of these blocks, as far as they are on a stage; `sparse` says which layers have experts."""
        found = 0
        for block in blocks:
            whole = self.sparse_layer if sparse(block.layer) else self.layer
            found += self.attention * block.attention + (whole - self.attention) * block.feed_forward
        return found

    @property
    def active_layer(self) -> float:
        """Of one block, what a token goes through: a mean over the blocks."""
        return self._blocks(self.sparse_layer - self.idle) / self.layers if self.sparse else self.layer

    def _blocks(self, sparse_layer: int) -> int:
        return (self.layers - self.sparse) * self.layer + self.sparse * sparse_layer


@cache
def count_parameters(model: ModelConfig, seq_len: int) -> Parameters:
    """Count from a resolved config; `seq_len` is the number of learned positions where the model does not say."""
    h, d, inner = model.hidden, model.dim_per_head, model.dim_ffn
    q, kv = model.heads * d, model.num_kv_heads * d
    gates = 2 if model.gated else 1

    def feed_forward(size: int) -> int:
        return h * size * (gates + 1) + (size * gates + h) * model.bias

    expert = feed_forward(model.dim_expert)
    router = model.experts * (h + model.router_bias + model.bias)
    sparse = router + model.experts * expert + h * model.shared_gate
    sparse += feed_forward(model.shared_ffn) if model.shared_ffn else 0
    norm = h if model.norm == "rms" else 2 * h
    attention = sum(matrix.numel for matrix in attention_matrices(model)) + latent_norms(model)
    attention += (q + 2 * kv) * (model.bias or model.qkv_bias) + h * model.bias + qk_norms(model) + sinks(model)
    norms = norms_of_a_layer(model) * norm
    outside = attention + norms
    layer = outside + feed_forward(inner)
    further = [model.is_sparse(n) for n in model.further_layers]
    return Parameters(
        layers=model.layers,
        layer=layer,
        attention=attention + norms // 2,
        embedding=model.vocab_size * h + positions(model, seq_len) * h,
        final_norm=norm,
        head=0 if model.tied else model.vocab_size * h,
        sparse=sum(map(model.is_sparse, range(model.layers))),
        sparse_layer=outside + sparse,
        expert=expert,
        idle=(model.experts - model.top_k) * expert,
        further=sum((outside + sparse if each else layer) + joining(model) + 3 * norm for each in further),
        further_sparse=sum(further),
    )


def joining(model: ModelConfig) -> int:
    """Elements of the matrix that joins a token to come to the residual stream, in a layer that predicts further."""
    return 2 * model.hidden * model.hidden


def norms_of_a_layer(model: ModelConfig) -> int:
    """Norms over the residual stream in one block."""
    return 4 if model.norm_placement == "sandwich" else 2


def qk_norms(model: ModelConfig) -> int:
    """Parameters of the norms of queries and keys in one block."""
    if not model.qk_norm:
        return 0
    heads = model.heads + model.num_kv_heads if model.qk_norm_width == "full" else 2
    return heads * model.dim_per_head


def sinks(model: ModelConfig) -> int:
    """Scores of the keys without a value in one block."""
    return model.heads if model.attention_sinks else 0


def positions(model: ModelConfig, seq_len: int) -> int:
    """Learned positions."""
    return (model.learned_positions or seq_len) if model.position == "learned" else 0
