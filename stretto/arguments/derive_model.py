"""Sizes of a model that follow from others, where nobody says them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from stretto.arguments.schema import Arguments
from stretto.arguments.setting import Value


def _kv_heads(a: Arguments) -> tuple[Value, str] | None:
    return a.model.num_kv_heads, "heads"


def _head_dim(a: Arguments) -> tuple[Value, str] | None:
    m = a.model
    return None if m.hidden % m.heads else (m.dim_per_head, f"hidden / heads = {m.hidden} / {m.heads}")


def _rope_head_dim(a: Arguments) -> tuple[Value, str] | None:
    m = a.model
    return (m.dim_rotary, f"head_dim // 2 = {m.dim_per_head} // 2") if m.latent and m.dim_rotary > 1 else None


def _v_head_dim(a: Arguments) -> tuple[Value, str] | None:
    m = a.model
    found = m.dim_value
    return (found, f"head_dim - rope_head_dim = {m.dim_per_head} - {m.dim_rotary}") if m.latent and found > 0 else None


def _ffn(a: Arguments) -> tuple[Value, str] | None:
    h = a.model.hidden
    return a.model.dim_ffn, f"8*hidden/3 = 8*{h}/3, up to a multiple of 64" if a.model.gated else f"4*hidden = 4*{h}"


def _expert_ffn(a: Arguments) -> tuple[Value, str] | None:
    return (a.model.dim_ffn, "ffn") if a.model.experts else None


OF_MODEL: Final[tuple[tuple[str, tuple[str, ...], str, Callable[[Arguments], tuple[Value, str] | None]], ...]] = (
    ("model.kv_heads", ("model.heads",), "heads", _kv_heads),
    ("model.head_dim", ("model.hidden", "model.heads"), "hidden / heads", _head_dim),
    ("model.rope_head_dim", ("model.head_dim", "model.kv_lora_rank"), "head_dim // 2", _rope_head_dim),
    (
        "model.v_head_dim",
        ("model.head_dim", "model.rope_head_dim", "model.kv_lora_rank"),
        "head_dim - rope_head_dim",
        _v_head_dim,
    ),
    (
        "model.ffn",
        ("model.hidden", "model.activation"),
        "4*hidden, 8*hidden/3 up to a multiple of 64 (gated: swiglu, geglu, geglu-tanh)",
        _ffn,
    ),
    ("model.expert_ffn", ("model.ffn", "model.experts"), "ffn (with experts)", _expert_ffn),
)
"""Path, inputs, the equation in names, and as a function: see `derive.Derivation`."""
