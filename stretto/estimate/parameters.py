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
    """Count from a resolved config; `seq_len` is the number of learned positions, where there are any."""
    h, d, inner = model.hidden, model.dim_per_head, model.dim_ffn
    q, kv = model.heads * d, model.num_kv_heads * d
    gates = 2 if model.activation == "swiglu" else 1
    norm = h if model.norm == "rms" else 2 * h
    matrices = h * (q + 2 * kv) + q * h + h * inner * gates + inner * h
    biases = (q + 2 * kv) * (model.bias or model.qkv_bias) + (h + inner * gates + h) * model.bias
    return Parameters(
        layers=model.layers,
        layer=matrices + biases + 2 * norm + 2 * d * model.qk_norm,
        embedding=model.vocab_size * h + seq_len * h * (model.position == "learned"),
        final_norm=norm,
        head=0 if model.tied else model.vocab_size * h,
    )
