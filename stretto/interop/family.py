"""What there is to say of one family of models: the fields of its `config.json`, and what all of its models have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal

Fields = Mapping[str, Any]

GATED: Final = MappingProxyType(
    {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu-tanh", "gelu_new": "geglu-tanh", "gelu": "geglu"}
)
PLAIN: Final = MappingProxyType(
    {"gelu": "gelu", "gelu_new": "gelu-tanh", "gelu_fast": "gelu-tanh", "gelu_pytorch_tanh": "gelu-tanh"}
)

SIZES: Final = MappingProxyType(
    {
        "num_hidden_layers": "layers",
        "hidden_size": "hidden",
        "num_attention_heads": "heads",
        "intermediate_size": "ffn",
        "vocab_size": "vocab",
    }
)
LLAMA: Final = MappingProxyType({**SIZES, "num_key_value_heads": "kv_heads", "rms_norm_eps": "norm_eps"})

Windows = Literal["none", "all", "switched", "every"]
"""Which layers have a window: none may, all with `sliding_window`, those that `use_sliding_window` and
`max_window_layers` name, or all but each n-th."""


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    `fields` become the settings of that name; `fixed` are the settings that all its models have; `defaults` stand
    where a file leaves a field out; `only` are fields with the values that are supported.
    """

    model_type: str
    architecture: str
    fields: Fields
    fixed: Fields = field(default_factory=dict)
    defaults: Fields = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    activation: str = "hidden_act"
    head_dim: bool = True
    """Whether `head_dim` is a field of its own."""
    windows: Windows = "none"
    every: int = 0
    local_rope: bool = False
    """Whether layers with a window have wavelengths of their own, never stretched."""
    share: str = ""
    """The old name of the field for the share of a head that is rotated, where there is one."""
    also: Mapping[str, str] = field(default_factory=dict)
    """Other names of its fields, and ours for them."""
    biased: bool = False
    """Whether `attention_bias` gives queries, keys and values biases."""
    shared: bool = False
    """Whether `n_shared_experts` are as many times the inner size of one expert."""
    latent: bool = False
    """Whether heads have a part that is rotated beside one that is not, `qk_rope_head_dim` and `qk_nope_head_dim`."""
    tied: bool = False
    """Whether head and embedding are tied unless a file says otherwise."""

    @property
    def gated(self) -> bool:
        """Whether its feed-forward blocks multiply two projections."""
        return "num_key_value_heads" in self.fields


RMS_DEFAULTS: Final = MappingProxyType({"rms_norm_eps": 1e-6, "num_key_value_heads": None})
