"""The matrices of attention, from a config: which there are, of which sizes, and which dimension of each tp cuts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stretto.arguments.schema import ModelConfig


@dataclass(frozen=True)
class Matrix:
    """[rows, columns] under its name in the attention of a block; `cut` is the dimension that tp cuts, if any."""

    name: str
    rows: int
    columns: int
    cut: Literal["rows", "columns", ""] = "rows"

    @property
    def numel(self) -> int:
        """Its elements."""
        return self.rows * self.columns


def attention_matrices(model: ModelConfig) -> tuple[Matrix, ...]:
    """Those of one block, in the order in which the model declares them."""
    h, q = model.hidden, model.heads * model.dim_per_head
    out = Matrix("o_proj", h, model.heads * model.dim_value, "columns")
    if model.kv_lora_rank is None:
        kv = model.num_kv_heads * model.dim_per_head
        return Matrix("q_proj", q, h), Matrix("k_proj", kv, h), Matrix("v_proj", kv, h), out
    kv, plain = model.kv_lora_rank, model.dim_per_head - model.dim_rotary
    low = Matrix("kv_a_proj_with_mqa", kv + model.dim_rotary, h, "")
    up = Matrix("kv_b_proj", model.heads * (plain + model.dim_value), kv)
    if model.q_lora_rank is None:
        return low, Matrix("q_proj", q, h), up, out
    return Matrix("q_a_proj", model.q_lora_rank, h, ""), low, Matrix("q_b_proj", q, model.q_lora_rank), up, out


def latent_norms(model: ModelConfig) -> int:
    """Parameters of the norms over the latents of one block."""
    return (model.kv_lora_rank or 0) + (model.q_lora_rank or 0) * model.latent
