"""Operations of a training step, by the two conventions in use."""

from __future__ import annotations

from dataclasses import dataclass

from stretto.arguments.schema import ModelConfig
from stretto.estimate.parameters import count_parameters


@dataclass(frozen=True)
class Flops:
    """Operations for one token, forward and backward, recomputation never counted.

    6 N for the matrices, N being the parameters that a token is multiplied with (the head, not the embedding; of the
    experts those that it goes to), and
    12 L h s for attention over the whole square of the sequence (`full`), or half of that, which a causal mask leaves
    (`causal`). h is heads times the size of one.
    """

    full: float
    causal: float


def flops_per_token(model: ModelConfig, seq_len: int) -> Flops:
    """From a resolved config."""
    p = count_parameters(model, seq_len)
    h, d = model.hidden, model.dim_per_head
    gates = 2 if model.gated else 1
    attended = h * d * (2 * model.heads + 2 * model.num_kv_heads)
    dense = model.dim_ffn * (gates + 1)
    sparse = (model.top_k * model.dim_expert + model.shared_ffn) * (gates + 1) + model.experts + model.shared_gate
    inner = (p.layers - p.sparse) * dense + p.sparse * sparse
    matrices = 6.0 * (p.layers * attended + h * inner + model.vocab_size * h)
    attention = 12.0 * p.layers * model.heads * d * seq_len
    return Flops(matrices + attention, matrices + attention / 2)
