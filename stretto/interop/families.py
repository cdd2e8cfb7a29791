"""The model families that can be read and written: what a `config.json` of each may say, and what it means here.

A field is in one table or another: it becomes a setting, it may have certain values only, it concerns training or
generation and is told of, or it says nothing of the model. A field in none of them is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from stretto.interop.family import GATED as GATED
from stretto.interop.family import LLAMA, RMS_DEFAULTS, SIZES
from stretto.interop.family import PLAIN as PLAIN
from stretto.interop.family import Family as Family
from stretto.interop.sparse_families import SPARSE

_GEMMA: Final = MappingProxyType(
    {
        "norm_zero_centered": True,
        "norm_placement": "sandwich",
        "scale_embedding": True,
    }
)
_GEMMA_FIELDS: Final = MappingProxyType(
    {
        **LLAMA,
        "query_pre_attn_scalar": "attention_scalar",
        "attn_logit_softcapping": "attention_softcap",
        "final_logit_softcapping": "logit_softcap",
    }
)
_GEMMA_ONLY: Final = MappingProxyType({"attention_bias": (False,), "use_bidirectional_attention": (False, None)})
_OLMO: Final = MappingProxyType({"norm_placement": "post", "qk_norm": True, "qk_norm_width": "full"})
_LAYER_NORM: Final = MappingProxyType({"norm": "layer", "bias": True})

FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {
        family.model_type: family
        for family in (
            Family("llama", "LlamaForCausalLM", LLAMA, defaults=RMS_DEFAULTS, only={"pretraining_tp": (1,)}),
            Family(
                "mistral",
                "MistralForCausalLM",
                LLAMA,
                defaults={**RMS_DEFAULTS, "num_key_value_heads": 8, "sliding_window": 4096},
                windows="all",
            ),
            Family(
                "qwen2",
                "Qwen2ForCausalLM",
                LLAMA,
                fixed={"qkv_bias": True},
                defaults=RMS_DEFAULTS,
                head_dim=False,
                windows="switched",
            ),
            Family(
                "qwen3",
                "Qwen3ForCausalLM",
                LLAMA,
                fixed={"qk_norm": True},
                defaults={**RMS_DEFAULTS, "head_dim": 128},
                only={"attention_bias": (False,)},
                windows="switched",
            ),
            Family(
                "gemma2",
                "Gemma2ForCausalLM",
                _GEMMA_FIELDS,
                fixed=_GEMMA,
                defaults={
                    **RMS_DEFAULTS,
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
                    **RMS_DEFAULTS,
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
                LLAMA,
                fixed=_OLMO,
                defaults={**RMS_DEFAULTS, "rms_norm_eps": 1e-5},
                only={"attention_bias": (False,)},
                head_dim=False,
            ),
            Family(
                "olmo3",
                "Olmo3ForCausalLM",
                LLAMA,
                fixed=_OLMO,
                defaults={**RMS_DEFAULTS, "rms_norm_eps": 1e-5, "sliding_window": 4096},
                only={"attention_bias": (False,)},
                head_dim=False,
                windows="every",
                every=4,
                local_rope=True,
            ),
            Family(
                "phi3",
                "Phi3ForCausalLM",
                LLAMA,
                defaults={**RMS_DEFAULTS, "rms_norm_eps": 1e-5},
                only={"attention_bias": (False,)},
                head_dim=False,
                windows="all",
                share="partial_rotary_factor",
            ),
            *SPARSE,
            Family(
                "gpt_neox",
                "GPTNeoXForCausalLM",
                {**SIZES, "layer_norm_eps": "norm_eps", "use_parallel_residual": "parallel_residual"},
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
