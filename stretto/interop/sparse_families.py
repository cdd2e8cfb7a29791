"""The families with experts."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from stretto.interop.family import LLAMA, RMS_DEFAULTS, Family

_EXPERTS: Final = MappingProxyType({"num_experts": "experts", "num_experts_per_tok": "top_k"})
_LOCAL: Final = MappingProxyType({"num_local_experts": "num_experts"})
_SPARSE: Final = MappingProxyType({"decoder_sparse_step": "sparse_every", "mlp_only_layers": "dense_layers"})
_RENORMALIZED: Final = MappingProxyType({"norm_topk_prob": "router_renormalize"})

_ROUTED: Final = MappingProxyType(
    {
        "n_routed_experts": "experts",
        "num_experts_per_tok": "top_k",
        "moe_intermediate_size": "expert_ffn",
        "first_k_dense_replace": "first_dense",
        "routed_scaling_factor": "router_scale",
        "n_group": "router_groups",
        "topk_group": "router_top_groups",
    }
)
"""What DeepSeek's configs call experts and their router, and GLM's after them."""

_LATENT: Final = MappingProxyType(
    {
        **LLAMA,
        "kv_lora_rank": "kv_lora_rank",
        "q_lora_rank": "q_lora_rank",
        "qk_rope_head_dim": "rope_head_dim",
        "v_head_dim": "v_head_dim",
        **_ROUTED,
    }
)
_LATENT_DEFAULTS: Final = MappingProxyType(
    {
        **RMS_DEFAULTS,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    }
)
_LATENT_ONLY: Final = MappingProxyType(
    {
        "attention_bias": (False,),
        "pretraining_tp": (1,),
        "moe_layer_freq": (1,),
        "ep_size": (1,),
        "seq_aux": (True, False),
    }
)
"""`ep_size` is how the code that came with the models spread their experts."""

SPARSE: Final = (
    Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        _LATENT,
        fixed={"router_renormalize": False, "router_group_score": "max"},
        defaults={
            **_LATENT_DEFAULTS,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "moe_intermediate_size": 1407,
            "first_k_dense_replace": 0,
            "routed_scaling_factor": 1.0,
            "n_group": None,
            "topk_group": None,
            "topk_method": "greedy",
        },
        only={
            **_LATENT_ONLY,
            "topk_method": ("greedy", "group_limited_greedy"),
            "mlp_bias": (False,),
            "norm_topk_prob": (False,),
            "scoring_func": ("softmax",),
        },
        shared=True,
        latent=True,
        also={"num_experts": "n_routed_experts"},
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        {**_LATENT, **_RENORMALIZED, "rope_interleave": "rope_interleaved"},
        fixed={"router": "sigmoid", "router_bias": True, "router_group_score": "top2"},
        defaults={
            **_LATENT_DEFAULTS,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2048,
            "first_k_dense_replace": 3,
            "routed_scaling_factor": 2.5,
            "n_group": 8,
            "topk_group": 4,
            "norm_topk_prob": True,
            "rope_interleave": True,
        },
        only={**_LATENT_ONLY, "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
        shared=True,
        latent=True,
        also={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    ),
    Family(
        "gpt_oss",
        "GptOssForCausalLM",
        {
            **LLAMA,
            "num_local_experts": "experts",
            "num_experts_per_tok": "top_k",
            "swiglu_limit": "swiglu_limit",
            "swiglu_alpha": "swiglu_alpha",
        },
        fixed={"router": "softmax-top-k", "bias": True, "attention_sinks": True, "activation": "clamped-swiglu"},
        defaults={
            **RMS_DEFAULTS,
            "rms_norm_eps": 1e-5,
            "head_dim": 64,
            "num_key_value_heads": 8,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "swiglu_limit": 7.0,
            "swiglu_alpha": 1.702,
            "sliding_window": 128,
            "rope_theta": 150_000.0,
        },
        only={"attention_bias": (True,), "hidden_act": ("silu",)},
        windows="every",
        every=2,
        also={"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        {**LLAMA, "num_local_experts": "experts", "num_experts_per_tok": "top_k"},
        defaults={
            **RMS_DEFAULTS,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        only={"router_jitter_noise": (0.0,)},
        windows="all",
    ),
    Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {
            **LLAMA,
            **_EXPERTS,
            **_RENORMALIZED,
            "moe_intermediate_size": "expert_ffn",
            "shared_expert_intermediate_size": "shared_ffn",
            **_SPARSE,
        },
        fixed={"qkv_bias": True, "shared_gate": True},
        defaults={
            **RMS_DEFAULTS,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "decoder_sparse_step": 1,
            "mlp_only_layers": None,
            "norm_topk_prob": False,
        },
        only={"qkv_bias": (True,)},
        head_dim=False,
        windows="switched",
        also=_LOCAL,
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {
            **LLAMA,
            **_EXPERTS,
            **_RENORMALIZED,
            "moe_intermediate_size": "expert_ffn",
            **_SPARSE,
        },
        fixed={"qk_norm": True},
        defaults={
            **RMS_DEFAULTS,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "decoder_sparse_step": 1,
            "mlp_only_layers": None,
            "norm_topk_prob": False,
        },
        only={"attention_bias": (False,)},
        windows="switched",
        also=_LOCAL,
    ),
    Family(
        "olmoe",
        "OlmoeForCausalLM",
        {**LLAMA, **_EXPERTS, **_RENORMALIZED, "clip_qkv": "qkv_clip"},
        fixed={"qk_norm": True, "qk_norm_width": "full"},
        defaults={
            **RMS_DEFAULTS,
            "rms_norm_eps": 1e-5,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "clip_qkv": None,
        },
        only={"attention_bias": (False,)},
        head_dim=False,
        also=_LOCAL,
    ),
    Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        {
            **LLAMA,
            **_RENORMALIZED,
            **_ROUTED,
            "use_qk_norm": "qk_norm",
        },
        fixed={"router": "sigmoid", "router_bias": True, "router_group_score": "top2"},
        defaults={
            **RMS_DEFAULTS,
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
        share="partial_rotary_factor",
        biased=True,
        shared=True,
        also={"num_local_experts": "n_routed_experts"},
    ),
)
