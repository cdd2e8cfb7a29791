"""The model families that can be read and written: what a `config.json` of each may say, and what it means here.

A field is in one table or another: it becomes a setting, it may have certain values only, it concerns training or
generation and is told of, or it says nothing of the model. A field in none of them is an error.
"""

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

_SIZES: Final = MappingProxyType(
    {
        "num_hidden_layers": "layers",
        "hidden_size": "hidden",
        "num_attention_heads": "heads",
        "intermediate_size": "ffn",
        "vocab_size": "vocab",
    }
)
_LLAMA: Final = MappingProxyType({**_SIZES, "num_key_value_heads": "kv_heads", "rms_norm_eps": "norm_eps"})

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
    tied: bool = False
    """Whether head and embedding are tied unless a file says otherwise."""

    @property
    def gated(self) -> bool:
        """Whether its feed-forward blocks multiply two projections."""
        return "num_key_value_heads" in self.fields


_RMS_DEFAULTS: Final = MappingProxyType({"rms_norm_eps": 1e-6, "num_key_value_heads": None})
_GEMMA: Final = MappingProxyType(
    {
        "norm_zero_centered": True,
        "norm_placement": "sandwich",
        "scale_embedding": True,
    }
)
_GEMMA_FIELDS: Final = MappingProxyType(
    {
        **_LLAMA,
        "query_pre_attn_scalar": "attention_scalar",
        "attn_logit_softcapping": "attention_softcap",
        "final_logit_softcapping": "logit_softcap",
    }
)
_GEMMA_ONLY: Final = MappingProxyType({"attention_bias": (False,), "use_bidirectional_attention": (False, None)})
_OLMO: Final = MappingProxyType({"norm_placement": "post", "qk_norm": True, "qk_norm_width": "full"})
_EXPERTS: Final = MappingProxyType({"num_experts": "experts", "num_experts_per_tok": "top_k"})
_LOCAL: Final = MappingProxyType({"num_local_experts": "num_experts"})
_RENORMALIZED: Final = MappingProxyType({"norm_topk_prob": "router_renormalize"})
_LAYER_NORM: Final = MappingProxyType({"norm": "layer", "bias": True})

FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {
        family.model_type: family
        for family in (
            Family("llama", "LlamaForCausalLM", _LLAMA, defaults=_RMS_DEFAULTS, only={"pretraining_tp": (1,)}),
            Family(
                "mistral",
                "MistralForCausalLM",
                _LLAMA,
                defaults={**_RMS_DEFAULTS, "num_key_value_heads": 8, "sliding_window": 4096},
                windows="all",
            ),
            Family(
                "qwen2",
                "Qwen2ForCausalLM",
                _LLAMA,
                fixed={"qkv_bias": True},
                defaults=_RMS_DEFAULTS,
                head_dim=False,
                windows="switched",
            ),
            Family(
                "qwen3",
                "Qwen3ForCausalLM",
                _LLAMA,
                fixed={"qk_norm": True},
                defaults={**_RMS_DEFAULTS, "head_dim": 128},
                only={"attention_bias": (False,)},
                windows="switched",
            ),
            Family(
                "gemma2",
                "Gemma2ForCausalLM",
                _GEMMA_FIELDS,
                fixed=_GEMMA,
                defaults={
                    **_RMS_DEFAULTS,
                    "head_dim": 256,
                    "num_key_value_heads": 4,
                    "query_pre_attn_scalar": 256,
                    "attn_logit_softcapping": 50.0,
                    "final_logit_softcapping": 30.0,
                    "sliding_window": 4096,
                    "hidden_activation": "gelu_pytorch_tanh",
                },
                only={**_GEMMA_ONLY, "hidden_act": ("gelu_pytorch_tanh",)},
                activation="hidden_activation",
                windows="every",
                every=2,
                tied=True,
            ),
            Family(
                "gemma3_text",
                "Gemma3ForCausalLM",
                _GEMMA_FIELDS,
                fixed={**_GEMMA, "qk_norm": True},
                defaults={
                    **_RMS_DEFAULTS,
                    "head_dim": 256,
                    "num_key_value_heads": 4,
                    "query_pre_attn_scalar": 256,
                    "attn_logit_softcapping": None,
                    "final_logit_softcapping": None,
                    "sliding_window": 4096,
                    "hidden_activation": "gelu_pytorch_tanh",
                    "rope_theta": 1_000_000.0,
                    "rope_local_base_freq": 10_000.0,
                },
                only=_GEMMA_ONLY,
                activation="hidden_activation",
                windows="every",
                every=6,
                local_rope=True,
                tied=True,
            ),
            Family(
                "olmo2",
                "Olmo2ForCausalLM",
                _LLAMA,
                fixed=_OLMO,
                defaults={**_RMS_DEFAULTS, "rms_norm_eps": 1e-5},
                only={"attention_bias": (False,)},
                head_dim=False,
            ),
            Family(
                "olmo3",
                "Olmo3ForCausalLM",
                _LLAMA,
                fixed=_OLMO,
                defaults={**_RMS_DEFAULTS, "rms_norm_eps": 1e-5, "sliding_window": 4096},
                only={"attention_bias": (False,)},
                head_dim=False,
                windows="every",
                every=4,
                local_rope=True,
            ),
            Family(
                "phi3",
                "Phi3ForCausalLM",
                _LLAMA,
                defaults={**_RMS_DEFAULTS, "rms_norm_eps": 1e-5},
                only={"attention_bias": (False,)},
                head_dim=False,
                windows="all",
                share="partial_rotary_factor",
            ),
            Family(
                "mixtral",
                "MixtralForCausalLM",
                {**_LLAMA, "num_local_experts": "experts", "num_experts_per_tok": "top_k"},
                defaults={
                    **_RMS_DEFAULTS,
                    "rms_norm_eps": 1e-5,
                    "num_key_value_heads": 8,
                    "num_local_experts": 8,
                    "num_experts_per_tok": 2,
                },
                only={"router_jitter_noise": (0.0,)},
                windows="all",
            ),
            Family(
                "qwen3_moe",
                "Qwen3MoeForCausalLM",
                {
                    **_LLAMA,
                    **_EXPERTS,
                    **_RENORMALIZED,
                    "moe_intermediate_size": "expert_ffn",
                    "decoder_sparse_step": "sparse_every",
                },
                fixed={"qk_norm": True},
                defaults={
                    **_RMS_DEFAULTS,
                    "num_experts": 128,
                    "num_experts_per_tok": 8,
                    "moe_intermediate_size": 768,
                    "decoder_sparse_step": 1,
                    "norm_topk_prob": False,
                },
                only={"attention_bias": (False,), "mlp_only_layers": ([], None)},
                windows="switched",
                also=_LOCAL,
            ),
            Family(
                "olmoe",
                "OlmoeForCausalLM",
                {**_LLAMA, **_EXPERTS, **_RENORMALIZED},
                fixed={"qk_norm": True, "qk_norm_width": "full"},
                defaults={
                    **_RMS_DEFAULTS,
                    "rms_norm_eps": 1e-5,
                    "num_experts": 64,
                    "num_experts_per_tok": 8,
                    "norm_topk_prob": False,
                },
                only={"attention_bias": (False,), "clip_qkv": (None,)},
                head_dim=False,
                also=_LOCAL,
            ),
            Family(
                "glm4_moe",
                "Glm4MoeForCausalLM",
                {
                    **_LLAMA,
                    **_RENORMALIZED,
                    "n_routed_experts": "experts",
                    "num_experts_per_tok": "top_k",
                    "moe_intermediate_size": "expert_ffn",
                    "first_k_dense_replace": "first_dense",
                    "routed_scaling_factor": "router_scale",
                    "n_group": "router_groups",
                    "topk_group": "router_top_groups",
                    "use_qk_norm": "qk_norm",
                },
                fixed={"router": "sigmoid", "router_bias": True, "router_group_score": "top2"},
                defaults={
                    **_RMS_DEFAULTS,
                    "rms_norm_eps": 1e-5,
                    "num_key_value_heads": 8,
                    "n_routed_experts": 128,
                    "n_shared_experts": 1,
                    "num_experts_per_tok": 8,
                    "moe_intermediate_size": 1408,
                    "first_k_dense_replace": 1,
                    "routed_scaling_factor": 1.0,
                    "n_group": 1,
                    "topk_group": 1,
                    "norm_topk_prob": True,
                    "use_qk_norm": False,
                    "attention_bias": False,
                    "partial_rotary_factor": 0.5,
                },
                only={"num_nextn_predict_layers": (0, None)},
                share="partial_rotary_factor",
                biased=True,
                shared=True,
                also={"num_local_experts": "n_routed_experts"},
            ),
            Family(
                "gpt_neox",
                "GPTNeoXForCausalLM",
                {**_SIZES, "layer_norm_eps": "norm_eps", "use_parallel_residual": "parallel_residual"},
                fixed=_LAYER_NORM,
                defaults={
                    "layer_norm_eps": 1e-5,
                    "use_parallel_residual": True,
                    "hidden_act": "gelu",
                    "partial_rotary_factor": 0.25,
                },
                only={"attention_bias": (True,)},
                head_dim=False,
                share="rotary_pct",
            ),
            Family(
                "gpt2",
                "GPT2LMHeadModel",
                {
                    "n_layer": "layers",
                    "n_embd": "hidden",
                    "n_head": "heads",
                    "n_inner": "ffn",
                    "n_positions": "learned_positions",
                    "vocab_size": "vocab",
                    "layer_norm_epsilon": "norm_eps",
                },
                fixed={**_LAYER_NORM, "position": "learned"},
                defaults={
                    "n_inner": None,
                    "n_positions": 1024,
                    "layer_norm_epsilon": 1e-5,
                    "activation_function": "gelu_new",
                },
                only={
                    "add_cross_attention": (False,),
                    "reorder_and_upcast_attn": (False,),
                    "scale_attn_by_inverse_layer_idx": (False,),
                    "scale_attn_weights": (True,),
                },
                activation="activation_function",
                head_dim=False,
                tied=True,
            ),
        )
    }
)
