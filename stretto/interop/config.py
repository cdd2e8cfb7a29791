"""`config.json` of a Hugging Face model as settings of ours.

The file is somebody else's: its size, its numbers and its names are checked, and whatever is not understood is
named. Nothing of it is imported or run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any

from stretto import reading
from stretto.arguments.model import ModelConfig
from stretto.arguments.unused import with_effect
from stretto.interop.errors import InteropError, of_a_run
from stretto.interop.families import FAMILIES, GATED, PLAIN, Family
from stretto.interop.fields import NEUTRAL, ONLY, TRAINING
from stretto.interop.names import PREDICTS_FURTHER
from stretto.interop.rope import rope_settings
from stretto.interop.values import ANY, layers, number, switch
from stretto.interop.windows import window_settings
from stretto.reading import UnreadableError

LIMIT = 1 << 20
"""Bytes of a config.json: real ones have a few thousand."""

_LARGEST = {
    "layers": 1 << 12,
    "experts": 1 << 12,
    "heads": 1 << 14,
    "kv_heads": 1 << 14,
    "head_dim": 1 << 14,
    "vocab": 1 << 24,
}
_REAL = frozenset(
    (
        *("router_scale", "norm_eps", "attention_scalar", "attention_softcap", "logit_softcap"),
        *("swiglu_limit", "swiglu_alpha", "qkv_clip"),
    )
)
"""Settings that are no whole numbers."""

_SIZES_OF_LATENTS = frozenset(("kv_lora_rank", "rope_head_dim", "v_head_dim"))

_WINDOWS = frozenset(
    [
        "layer_types",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "sliding_window_pattern",
        "_sliding_window_pattern",
    ]
)
_ROPE = frozenset(
    [
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "rope_local_base_freq",
        "rotary_emb_base",
        "rotary_pct",
        "partial_rotary_factor",
    ]
)
_BIASES = frozenset(("attention_bias", "mlp_bias"))
_BALANCE = "is not taken over: say --balance-loss for this run"
_LEFT_OUT = MappingProxyType(
    {
        **dict.fromkeys(TRAINING, "is not taken over: say --dropout for this run"),
        **dict.fromkeys(("router_aux_loss_coef", "aux_loss_alpha"), _BALANCE),
        "num_nextn_predict_layers": "layers that predict further tokens are left out unless --mtp-layers is said",
    }
)
"""Numbers that are told of, and what with them."""

OF_THE_RUN = frozenset(
    (
        *("dropout", "init_std", "balance_loss", "router_z_loss", "router_bias_rate"),
        *("expert_capacity", "expert_drop", "mtp_layers", "mtp_loss"),
    )
)
"""Settings of the model that a run says for itself."""


@dataclass(frozen=True)
class HfConfig:
    """A `config.json` that was understood: its family, the settings of the model, and what was left to the run."""

    family: Family
    model: ModelConfig
    raw: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def further(self) -> int:
        """Layers behind the last, which predict further tokens; of these `model.mtp_layers` are made use of."""
        return int(self.raw.get("num_nextn_predict_layers", self.raw.get("num_mtp_layers")) or 0)

    @property
    def passed_over(self) -> tuple[str, ...]:
        """How names begin of the tensors of those of them that are left out."""
        layers = self.model.layers
        return tuple(f"model.layers.{n}." for n in range(layers + self.model.mtp_layers, layers + self.further))

    def predicting(self, mtp_layers: int) -> HfConfig:
        """The same with so many of these layers. Raises InteropError where there are fewer, or none like ours."""
        if mtp_layers > self.further or (mtp_layers and self.family.model_type not in PREDICTS_FURTHER):
            fields = f"num_nextn_predict_layers = {self.further} of this {self.family.model_type}"
            raise InteropError(f"mtp_layers = {mtp_layers}, but {fields}: try --mtp-layers 0", [])
        return replace(self, model=replace(self.model, mtp_layers=mtp_layers))

    def settings(self) -> dict[str, Any]:
        """The model's settings as a table: all but those that every run says for itself."""
        return {name: value for name, value in vars(self.model).items() if name not in OF_THE_RUN}


def read_config(directory: Path) -> HfConfig:
    """The model that `directory`/config.json describes. Raises InteropError with everything that is not supported."""
    path = directory / "config.json"
    raw = read_json(path, LIMIT)
    kind = raw.get("model_type")
    if kind is None:
        raise InteropError(f"{path} has no model_type: it must be one of {', '.join(FAMILIES)}", [])
    if not isinstance(kind, str) or kind not in FAMILIES:
        guess = "".join(f"; did you mean {near}?" for near in get_close_matches(str(kind), FAMILIES, n=1))
        what = f"model_type = {str(kind)[:100]!r} is not supported: there are {', '.join(FAMILIES)}{guess}"
        raise InteropError(f"{path}: {what}", [])
    return understand(raw, FAMILIES[kind], str(path))


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes. Raises InteropError."""
    try:
        raw = reading.read_json(path, limit)
    except UnreadableError as error:
        raise InteropError(f"cannot read {path}: {error}{of_a_run(path.parent)}", []) from error
    if not isinstance(raw, dict):
        raise InteropError(f"{path} holds no JSON object", [])
    return raw


def understand(raw: Mapping[str, Any], family: Family, where: str) -> HfConfig:
    """The settings that the fields of a config stand for. Raises InteropError with all that is not understood."""
    reader = _Reader({family.also.get(name, name): value for name, value in raw.items()}, family)
    values = reader.settings()
    if reader.wrong:
        what = f"{where}: {len(reader.wrong)} fields of this {family.model_type} are not supported"
        raise InteropError(what, reader.wrong)
    return HfConfig(family, with_effect(ModelConfig(**values)), raw, tuple(reader.notes))


@dataclass
class _Reader:
    raw: Mapping[str, Any]
    family: Family
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def settings(self) -> dict[str, Any]:
        family = self.family
        self._known()
        values: dict[str, Any] = dict(family.fixed)
        for name, setting in family.fields.items():
            values[setting] = self._value(name, setting)
        if self.wrong:  # what follows computes with the sizes
            return values
        count, heads, hidden = values["layers"], values["heads"], values["hidden"]
        default = ModelConfig(hidden=hidden, heads=heads, activation="gelu")
        if "activation" not in family.fixed:
            values["activation"] = self._activation()
        values["head_dim"] = self._head_dim(hidden, heads)
        if "dense_layers" in values:  # their code passes over those that it has no layer for
            values["dense_layers"] = tuple(sorted({n for n in values["dense_layers"] or () if n < count}))
        values["ffn"] = values["ffn"] or default.dim_ffn
        values["tied"] = self._switch("tie_word_embeddings", family.tied)
        if family.model_type == "llama":
            values["bias"] = self._bias()
        if "experts" in values:
            values.setdefault("expert_ffn", values["ffn"])
        if family.biased:
            values["qkv_bias"] = self._switch("attention_bias", False)
        if family.model_type == "deepseek_v2" and self.get("topk_method") == "greedy":
            values |= {"router_groups": 1, "router_top_groups": 1}
        if family.shared:
            values["shared_ffn"] = self._value("n_shared_experts", "shared_ffn") * values["expert_ffn"]
        window, whole = window_settings(self.raw, family, count, self.wrong)
        values["window"], values["global_layers"] = window, whole
        if values.get("position") != "learned":
            found = rope_settings(self.raw, family, windowed=window is not None, wrong=self.wrong)
            values |= found
        scalar = values.get("attention_scalar")
        if scalar is not None and scalar == values["head_dim"]:
            values["attention_scalar"] = None  # the usual one
        return values

    def get(self, name: str) -> Any:
        """A field, or what stands for it where it is left out."""
        return self.raw.get(name, self.family.defaults.get(name))

    def _known(self) -> None:
        """Each field must be in one of the tables."""
        family = self.family
        read = {*family.fields, family.activation, "tie_word_embeddings", "head_dim"}
        if family.model_type == "llama":
            read |= _BIASES
        read |= {"attention_bias"} if family.biased else set()
        read |= {"n_shared_experts"} if family.shared else set()
        read |= {"qk_nope_head_dim", "qk_head_dim"} if family.latent else set()
        read |= _WINDOWS if family.windows != "none" else set()
        read |= _ROPE if family.fixed.get("position") != "learned" else set()
        for name, value in self.raw.items():
            if name not in read and name not in NEUTRAL:
                self._no_setting(name, value)

    def _no_setting(self, name: str, value: Any) -> None:
        """A field that becomes no setting: told of, or wrong."""
        allowed = {**ONLY, **self.family.only}.get(name)
        if name in _LEFT_OUT:
            if value and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 100):
                self.wrong.append(f"{name} = {value!r:.60}: must be a number from 0 to 99")
            elif value:
                self.notes.append(f"{name} = {value!r:.20} {_LEFT_OUT[name]}")
        elif allowed is not None:
            if not any(value is each or value == each for each in allowed):
                self.wrong.append(f"{name} = {value!r:.60}: must be {' or '.join(map(repr, allowed))}")
        elif name == "quantization_config":
            self.wrong.append(f"{name}: quantized weights are not supported, take the model in bf16")
        elif name != "sliding_window_size" or value != self.raw.get("sliding_window"):  # the same under another name
            self.wrong.append(f"{name!r:.60} = {value!r:.60}: unknown")

    def _value(self, name: str, setting: str) -> Any:
        default = getattr(ModelConfig(), setting)
        value = self.get(name)
        if value is None and name in self.family.defaults and setting not in _SIZES_OF_LATENTS:
            return default if name in ("n_group", "topk_group") else None
        if isinstance(default, bool):
            return self._switch(name, default=bool(value))
        if isinstance(default, tuple):
            return layers(name, value, self.wrong)
        if setting in _REAL:
            return number(name, value, self.wrong)
        most, least = _LARGEST.get(setting, ANY), int(setting not in ("first_dense", "shared_ffn"))
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.wrong.append(f"{name} = {value!r:.60}: must be a whole number from {least} to {most:,}")
            return 1
        return value

    def _switch(self, name: str, default: bool) -> bool:
        return switch(name, self.raw.get(name, default), self.wrong, default)

    def _activation(self) -> str:
        name = self.family.activation
        said = self.get(name) or self.family.defaults.get(name) or "silu"
        known = GATED if self.family.gated else PLAIN
        if said not in known:
            self.wrong.append(f"{name} = {said!r:.60}: must be one of {', '.join(known)}")
            return "swiglu"
        return known[said]

    def _head_dim(self, hidden: int, heads: int) -> int:
        value = self.get("head_dim")
        if self.family.latent:
            rotated = int(self._value("qk_rope_head_dim", "head_dim"))
            whole = rotated + int(self._value("qk_nope_head_dim", "head_dim"))
            for name, said, meant in (("head_dim", value, rotated), ("qk_head_dim", self.get("qk_head_dim"), whole)):
                if said not in (None, meant):
                    self.wrong.append(f"{name} = {said!r:.60}: must be {meant}, as the sizes of its parts make it")
            return whole
        if value is None or (not self.family.head_dim and value * heads == hidden):
            if hidden % heads:
                self.wrong.append(f"hidden_size = {hidden} is not a multiple of num_attention_heads = {heads}")
            return max(1, hidden // heads)
        if not self.family.head_dim:
            self.wrong.append(
                f"head_dim = {value!r:.60}: must be hidden_size / num_attention_heads = {hidden // heads}"
            )
            return 1
        return int(self._value("head_dim", "head_dim"))

    def _bias(self) -> bool:
        attention, mlp = self._switch("attention_bias", False), self._switch("mlp_bias", False)
        if attention != mlp:
            self.wrong.append(f"attention_bias = {attention} with mlp_bias = {mlp}: must be the same")
        return attention
