"""How many parameters a model has, from its config."""

from __future__ import annotations

from dataclasses import dataclass

from stretto.arguments.schema import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Parameters of one process's whole model, vocabulary unpadded."""

    layers: int
    """Blocks."""
    layer: int
    """One block."""
    embedding: int
    """Token and position embeddings."""
    final_norm: int
    head: int
    """The output head; 0 when it is tied to the embedding."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.layers * self.layer + self.embedding + self.final_norm + self.head


def count_parameters(model: ModelConfig, seq_len: int) -> Parameters:
    """Count from a resolved config; `seq_len` is the number of learned positions where the model does not say."""
    h, d, inner = model.hidden, model.dim_per_head, model.dim_ffn
    q, kv = model.heads * d, model.num_kv_heads * d
    gates = 2 if model.gated else 1
    norm = h if model.norm == "rms" else 2 * h
    matrices = h * (q + 2 * kv) + q * h + h * inner * gates + inner * h
    biases = (q + 2 * kv) * (model.bias or model.qkv_bias) + (h + inner * gates + h) * model.bias
    return Parameters(
        layers=model.layers,
        layer=matrices + biases + norms_of_a_layer(model) * norm + qk_norms(model) + sinks(model),
        embedding=model.vocab_size * h + positions(model, seq_len) * h,
        final_norm=norm,
        head=0 if model.tied else model.vocab_size * h,
    )


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
