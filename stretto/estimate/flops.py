"""Operations of a training step, by the two conventions in use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from stretto.arguments.schema import ModelConfig, TuningConfig
from stretto.estimate.attention import attention_matrices
from stretto.estimate.parameters import joining

WHOLE: Final = TuningConfig()
"""All is trained."""


@dataclass(frozen=True)
class Flops:
    """Operations for one token, forward and backward, recomputation never counted.

    6 N for the matrices, N being the parameters that a token is multiplied with (the head, not the embedding; of the
    experts those that it goes to), and
    12 L h s for attention over the whole square of the sequence (`full`), or half of that, which a causal mask leaves
    (`causal`). h is heads times the size of one, the mean of a key's and a value's. A matrix that is frozen has no
    gradient of its own: 4 N.
    """

    full: float
    causal: float


def flops_per_token(model: ModelConfig, seq_len: int, tuning: TuningConfig = WHOLE) -> Flops:
    """From a resolved config, of which `tuning` says what is trained."""
    h, inner = model.hidden, model.dim_ffn
    attended = {f"self_attn.{m.name}": (m.rows, m.columns) for m in attention_matrices(model)}
    dense = {"mlp.gate_proj": (inner, h)} if model.gated else {}
    dense |= {"mlp.up_proj": (inner, h), "mlp.down_proj": (h, inner)}
    head = "model.embed_tokens.weight" if model.tied else "lm_head.weight"
    matrices = model.vocab_size * h * _times(head, tuning) * (1 + model.mtp_layers)
    matrices += 6.0 * joining(model) * model.mtp_layers
    for layer in range(model.further_layers.stop):
        rows = attended | (_sparse(model) if model.is_sparse(layer) else dense)
        for name, (n, columns) in rows.items():
            matrices += n * columns * _times(f"model.layers.{layer}.{name}.weight", tuning)
            if tuning.adapts(name.rpartition(".")[2]) and ".experts." not in name:
                matrices += 6.0 * tuning.lora_rank * (n + columns)
    attention = 6.0 * model.further_layers.stop * model.heads * (model.dim_per_head + model.dim_value) * seq_len
    return Flops(matrices + attention, matrices + attention / 2)


def _times(name: str, tuning: TuningConfig) -> float:
    """Operations for each element of a matrix and token: forward, gradient of the input, and of the matrix."""
    return 6.0 if tuning.trains(name) else 4.0


def _sparse(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Rows and columns that a token is multiplied with in a sparse feed-forward, by one parameter of each kind."""
    gates = 2 if model.gated else 1
    rows = {
        "mlp.gate": model.experts,
        "mlp.experts.0.up_proj": model.top_k * model.dim_expert * (gates + 1),
        "mlp.shared_expert.up_proj": model.shared_ffn * (gates + 1),
        "mlp.shared_expert_gate": int(model.shared_gate),
    }
    return {name: (n, model.hidden) for name, n in rows.items()}
