"""The fields of a `config.json` for rotary positions, which have had three forms, as settings of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from stretto.arguments.model import ModelConfig
from stretto.interop.families import Family

WHOLE, LOCAL = "full_attention", "sliding_attention"
_BASE: Final = 10_000.0

_KINDS: Final = {
    "default": "none",
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
    "yarn": "yarn",
    "longrope": "longrope",
    "su": "longrope",  # its first name
}
_READ: Final = {
    "factor": "rope_factor",
    "original_max_position_embeddings": "rope_original_positions",
    "low_freq_factor": "rope_low_freq",
    "high_freq_factor": "rope_high_freq",
    "beta_fast": "rope_beta_fast",
    "beta_slow": "rope_beta_slow",
    "truncate": "rope_whole_pairs",
    "mscale": "rope_mscale",
    "mscale_all_dim": "rope_mscale_all",
    "attention_factor": "rope_attention_factor",
    "short_factor": "rope_short_factors",
    "long_factor": "rope_long_factors",
}
_MSCALE: Final = ("mscale", "mscale_all_dim")
"""With a latent alone."""
_LISTS: Final = ("short_factor", "long_factor")
_OF: Final[Mapping[str, tuple[str, ...]]] = {
    "none": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "truncate",
        *_MSCALE,
        "attention_factor",
    ),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", *_LISTS),
}
_OPTIONAL: Final = frozenset(("beta_fast", "beta_slow", "truncate", "attention_factor", *_MSCALE))
_WITHOUT_EFFECT: Final = {"truncate": (True,), "finetuned": (True, False)}


def rope_settings(raw: Mapping[str, Any], family: Family, *, windowed: bool, wrong: list[str]) -> dict[str, Any]:
    """The settings of the model that stand for its wavelengths; what is not supported goes to `wrong`, by its name."""
    whole, local, where = _tables(raw, family, wrong)
    values = _one(whole, raw, family, where, wrong)
    if local is None or not windowed:
        return values
    other = _one(local, raw, family, f"{where} of {LOCAL}", wrong)
    if other["rope_scaling"] != "none" or other["rope_share"] != values["rope_share"]:
        wrong.append(f"{where}: layers with a window must have unscaled wavelengths, of the same share of a head")
    if values["rope_scaling"] != "none" or other["rope_base"] != values["rope_base"]:
        values["rope_local_base"] = other["rope_base"]
    return values


def _tables(
    raw: Mapping[str, Any], family: Family, wrong: list[str]
) -> tuple[Mapping[str, Any], Mapping[str, Any] | None, str]:
    """What is said of the layers without a window, of those with one where that differs, and in which field."""
    said = raw.get("rope_parameters")
    scaling = raw.get("rope_scaling")
    for name, table in (("rope_parameters", said), ("rope_scaling", scaling)):
        if table is not None and not isinstance(table, dict):
            wrong.append(f"{name} = {table!r:.60}: must be a table")
            return {}, None, name
    if said:
        if not {WHOLE, LOCAL} & said.keys():
            return said, {"rope_theta": said.get("rope_theta", _BASE)} if family.local_rope else None, "rope_parameters"
        if not family.local_rope or not all(isinstance(said.get(kind), dict) for kind in (WHOLE, LOCAL)):
            wrong.append(
                f"rope_parameters: {family.model_type} must have one table, or one for {WHOLE} and {LOCAL} each"
            )
            return {}, None, "rope_parameters"
        return said[WHOLE], said[LOCAL], "rope_parameters"
    default = family.defaults.get("rope_theta", _BASE)
    base = raw.get("rope_theta", raw.get("rotary_emb_base", default))
    whole = {**(scaling or {}), "rope_theta": base}
    if not family.local_rope:
        return whole, None, "rope_scaling"
    local = raw.get("rope_local_base_freq", family.defaults.get("rope_local_base_freq", base))
    return whole, {"rope_theta": local}, "rope_scaling"


def _one(
    table: Mapping[str, Any], raw: Mapping[str, Any], family: Family, where: str, wrong: list[str]
) -> dict[str, Any]:
    """The settings of one table."""
    said = table.get("rope_type", table.get("type", "default"))
    kind = _KINDS.get(said) if isinstance(said, str) else None
    if kind is None:
        wrong.append(f"{where}.rope_type = {said!r:.60}: must be one of {', '.join(_KINDS)}")
        kind = "none"
    share = table.get("partial_rotary_factor", raw.get(family.share) if family.share else None)
    if share is None:
        share = raw.get("partial_rotary_factor", family.defaults.get("partial_rotary_factor", 1.0))
    values: dict[str, Any] = {
        "rope_scaling": kind,
        "rope_base": _number(f"{where}.rope_theta", table.get("rope_theta", _BASE), 1, 1e15, wrong),
        "rope_share": _number(f"{where}.partial_rotary_factor", share, 0, 1, wrong),
    }
    if not family.share and values["rope_share"] != 1:
        wrong.append(f"{where}.partial_rotary_factor = {share!r:.60}: {family.model_type} rotates whole heads")
    for name in _OF[kind]:
        value = _said_of(name, kind, table, raw)
        if name in _LISTS:
            values[_READ[name]] = _numbers(f"{where}.{name}", value, wrong)
        elif name == "truncate" and isinstance(value, bool):
            values[_READ[name]] = value
        elif value is not None or name not in _OPTIONAL:
            values[_READ[name]] = _number(f"{where}.{name}", value, 0, 1 << 40, wrong)
    if "rope_original_positions" in values:
        values["rope_original_positions"] = int(values["rope_original_positions"])
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_OF[kind]}
    known -= set() if family.latent else {*_MSCALE}
    for name, value in table.items():
        if name in known or value is None:
            continue
        if name not in _WITHOUT_EFFECT or value not in _WITHOUT_EFFECT[name]:
            wrong.append(f"{where}.{name!s:.40} = {value!r:.60}: not supported for rope_type = {said!r:.30}")
    return values


def _number(name: str, value: Any, above: float, most: float, wrong: list[str]) -> float:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not usable or not above < value <= most or not math.isfinite(value):
        wrong.append(f"{name} = {value!r:.60}: must be a number above {above:g}")
        return above + 1.0 if most > 1 else 1.0
    return float(value)


def _said_of(name: str, kind: str, table: Mapping[str, Any], raw: Mapping[str, Any]) -> Any:
    """A value of a table, or what stands for it where it is left out."""
    value = table.get(name)
    if name in _MSCALE and value == 0:  # which is to say: not
        return None
    if name == "original_max_position_embeddings":
        if kind == "dynamic":
            return raw.get("max_position_embeddings")
        return value or raw.get("original_max_position_embeddings") or raw.get("max_position_embeddings")
    return _growth(table, raw) if kind == "longrope" and name == "factor" and value is None else value


def _numbers(name: str, value: Any, wrong: list[str]) -> tuple[float, ...]:
    """A list of factors, one for each pair of a head."""
    if not isinstance(value, list) or not 1 <= len(value) <= 1 << 13:
        wrong.append(f"{name} = {value!r:.60}: must be a list of numbers")
        return ()
    return tuple(_number(name, number, 0, 1 << 20, wrong) for number in value)


def _growth(table: Mapping[str, Any], raw: Mapping[str, Any]) -> Any:
    """How many times as long contexts are with longrope, where no factor says it."""
    most = raw.get("max_position_embeddings")
    first = table.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings") or most
    if isinstance(most, int) and isinstance(first, int) and 0 < first <= most < 1 << 40:
        return most / first
    return None


def rope_fields(model: ModelConfig, family: Family) -> dict[str, Any]:
    """`rope_parameters` of a model of ours, in their present form."""
    kind = next(theirs for theirs, ours in _KINDS.items() if ours == model.rope_scaling)
    whole: dict[str, Any] = {"rope_type": kind, "rope_theta": model.rope_base}
    if family.model_type in ("gpt_neox", "phi3") or model.rope_share != 1:
        whole["partial_rotary_factor"] = model.rope_share
    for name in _OF[model.rope_scaling]:
        value = getattr(model, _READ[name])
        if value is not None and not (name == "truncate" and value):
            whole[name] = list(value) if isinstance(value, tuple) else value
    if kind == "dynamic":
        del whole["original_max_position_embeddings"]  # it is max_position_embeddings
    if not family.local_rope:
        return {"rope_parameters": whole}
    base = model.rope_base if model.rope_local_base is None else model.rope_local_base
    return {"rope_parameters": {WHOLE: whole, LOCAL: {"rope_type": "default", "rope_theta": base}}}
