"""The `config.json` of a model of ours: of the family that has just its shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stretto.arguments.model import ModelConfig
from stretto.interop.config import OF_THE_RUN, HfConfig, understand
from stretto.interop.errors import InteropError
from stretto.interop.families import FAMILIES, GATED, PLAIN, Family
from stretto.interop.names import PREDICTS_FURTHER
from stretto.interop.rope import rope_fields
from stretto.interop.windows import FULL, SLIDING


def write_config(model: ModelConfig, *, seq_len: int, dtype: str, family: str | None = None) -> HfConfig:
    """The `config.json` of a model of ours, of the `family`, or of the first one that has just this shape.

    Raises InteropError, with what differs from each family, where none has.
    """
    if family is not None and family not in FAMILIES:
        raise InteropError(f"model_type {family!r:.100} is not supported: there are {', '.join(FAMILIES)}", [])
    tried: list[tuple[int, str]] = []
    for candidate in FAMILIES.values() if family is None else [FAMILIES[family]]:
        raw = _fields(model, candidate, seq_len, dtype)
        try:
            found = understand(raw, candidate, candidate.model_type).predicting(model.mtp_layers)
        except InteropError as error:
            why = error.reasons or [str(error)]
            tried.append((len(vars(model)), f"{candidate.model_type}: {'; '.join(why)[:200]}"))
            continue
        if differs := _differences(model, found.model):
            tried.append((len(differs), f"{candidate.model_type}: {', '.join(differs)}"))
        else:
            return found
    nearest = [said for _, said in sorted(tried, key=lambda each: each[0])]
    raise InteropError("no Hugging Face family has just this shape; these settings stand against each", nearest)


def _fields(model: ModelConfig, family: Family, seq_len: int, dtype: str) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": dtype,
        "tie_word_embeddings": model.tied,
        "initializer_range": model.init_std,
    }
    derived: dict[str, Any] = {
        "kv_heads": model.num_kv_heads,
        "ffn": model.dim_ffn,
        "expert_ffn": model.dim_expert,
        "learned_positions": model.learned_positions,
        "rope_head_dim": model.dim_rotary,
        "v_head_dim": model.dim_value,
        "dense_layers": [n for n in _dense(model) if n < model.layers and (n + 1) % model.sparse_every == 0],
        "first_dense": next((n for n in range(model.layers) if n not in _dense(model)), model.layers),
    }
    derived |= {"attention_scalar": model.attention_scalar or float(model.dim_per_head)}
    if model.learned_positions is None:
        derived["learned_positions"] = seq_len
    for name, setting in family.fields.items():
        raw[name] = derived.get(setting, getattr(model, setting))
    scalar = raw.get("query_pre_attn_scalar")
    if isinstance(scalar, float) and scalar.is_integer():
        raw["query_pre_attn_scalar"] = int(scalar)
    known = GATED if family.gated else PLAIN
    named = {ours: theirs for theirs, ours in reversed(tuple(known.items()))}
    fixed = {family.fixed["activation"]: "silu"} if "activation" in family.fixed else {}
    raw[family.activation] = (fixed or named).get(model.activation, model.activation)
    if family.latent:
        raw |= {"qk_nope_head_dim": model.dim_per_head - model.dim_rotary, "head_dim": model.dim_rotary}
    elif family.head_dim:
        raw["head_dim"] = model.dim_per_head
    if family.latent or family.model_type in PREDICTS_FURTHER:
        raw["num_nextn_predict_layers"] = model.mtp_layers
    if family.model_type == "deepseek_v2":
        raw["topk_method"] = "greedy" if model.router_groups == 1 else "group_limited_greedy"
    if family.model_type == "llama":
        raw |= {"attention_bias": model.bias, "mlp_bias": model.bias}
    raw |= {"attention_bias": model.qkv_bias} if family.biased else {}
    raw |= {"n_shared_experts": model.shared_ffn // model.dim_expert} if family.shared else {}
    if family.fixed.get("position") != "learned":
        raw |= {"max_position_embeddings": max(seq_len, int(model.rope_factor * (model.rope_original_positions or 1)))}
        if model.rope_scaling == "dynamic":
            raw["max_position_embeddings"] = model.rope_original_positions
        raw |= rope_fields(model, family)
    return raw | _windows(model, family)


def _windows(model: ModelConfig, family: Family) -> dict[str, Any]:
    if family.windows == "none":
        return {}
    raw: dict[str, Any] = {"sliding_window": model.window}
    if family.windows == "switched":
        raw |= {"use_sliding_window": model.window is not None, "max_window_layers": model.layers}
    if family.windows != "all":
        raw["layer_types"] = [FULL if model.window_of(n) is None else SLIDING for n in range(model.layers)]
    return raw


def _differences(wanted: ModelConfig, found: ModelConfig) -> list[str]:
    """Settings that would be others after a way out and back in."""
    return [f"{name} = {one}, not {other}" for name, one, other in differences(wanted, found)]


def differences(wanted: ModelConfig, found: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    """Settings that mean another model, with both values: one that is unset means what is derived for it."""
    for name in vars(wanted):
        one, other = _meant(wanted, name), _meant(found, name)
        if one != other and name not in OF_THE_RUN:
            yield name, one, other


def _meant(model: ModelConfig, name: str) -> Any:
    """A setting, or what follows for it where it is unset; nothing where it has no effect."""
    derived: dict[str, Any] = {"kv_heads": model.num_kv_heads, "head_dim": model.dim_per_head, "ffn": model.dim_ffn}
    derived |= {"attention_scalar": model.attention_scalar or float(model.dim_per_head)}
    if model.latent:
        derived |= {"rope_head_dim": model.dim_rotary, "v_head_dim": model.dim_value}
    if model.experts:
        derived["expert_ffn"] = model.dim_expert
    if name in ("router", "router_renormalize") and model.router == "softmax-top-k":  # e^x over the sum of the chosen
        return {"router": "softmax", "router_renormalize": True}[name]
    if name == "router_group_score" and model.router_groups == 1:
        return None
    if name == "learned_positions":  # their number is the sequence's where nobody said it
        return None
    if name == "dense_layers":
        return _dense(model) if model.experts else ()
    if name in ("first_dense", "sparse_every"):  # what they make is in the list of those that are dense
        return None
    if name == "global_layers":
        return tuple(sorted(model.global_layers)) if model.window else ()
    return derived.get(name, getattr(model, name))


def _dense(model: ModelConfig) -> tuple[int, ...]:
    """The layers without experts, however that is said."""
    return tuple(n for n in range(model.further_layers.stop) if not model.is_sparse(n))
