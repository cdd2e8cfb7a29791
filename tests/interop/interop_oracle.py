"""The models of transformers in fp64, tiny and random: what ours are held against."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SEQ, ROWS = 12, 3

TINY: dict[str, Any] = {
    "hidden_size": 36,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 53,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 2.5, 4.0],
}
MLA: dict[str, Any] = {
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 4,
    "v_head_dim": 7,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
}
_KINDS = ["sliding_attention", "full_attention"]
_GEMMA = {"head_dim": 10, "sliding_window": 3, "query_pre_attn_scalar": 7}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "head_dim": 8},
    "llama3": {
        "model_type": "llama",
        "head_dim": 8,
        "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16},
        "tie_word_embeddings": True,
    },
    "llama-biased": {
        "model_type": "llama",
        "head_dim": 6,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0},
    },
    "llama-dynamic": {
        "model_type": "llama",
        "head_dim": 8,
        "max_position_embeddings": 8,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 2.0},
    },
    "mistral": {"model_type": "mistral", "head_dim": 14, "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "hidden_size": 32, "rope_parameters": YARN},
    "qwen2-windows": {
        "model_type": "qwen2",
        "hidden_size": 32,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 2,
        "tie_word_embeddings": True,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 10},
    "gemma2": {
        "model_type": "gemma2",
        **_GEMMA,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "layer_types": _KINDS * 2,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        **_GEMMA,
        "layer_types": [*_KINDS[:1] * 3, _KINDS[1]],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    },
    "olmo2": {"model_type": "olmo2", "hidden_size": 32},
    "olmo3": {
        "model_type": "olmo3",
        "hidden_size": 32,
        "sliding_window": 4,
        "rope_parameters": {
            "full_attention": YARN,
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "phi3": {
        "model_type": "phi3",
        "hidden_size": 32,
        "sliding_window": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.75},
    },
    "phi4-mini": {
        "model_type": "phi3",
        "hidden_size": 32,
        "tie_word_embeddings": True,
        "original_max_position_embeddings": 8,
        "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 8},
    },
    "phi3-short": {
        "model_type": "phi3",
        "hidden_size": 32,
        "original_max_position_embeddings": 32,
        "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 32},
    },
    "mixtral": {"model_type": "mixtral", "head_dim": 8, "num_local_experts": 6, "num_experts_per_tok": 3},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "hidden_size": 32,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 16,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 10,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
    },
    "qwen3_moe-listed": {
        "model_type": "qwen3_moe",
        "head_dim": 10,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "mlp_only_layers": [2, 0, 7],
    },
    "olmoe": {"model_type": "olmoe", "hidden_size": 32, "num_experts": 8, "num_experts_per_tok": 3},
    "olmoe-clipped": {
        "model_type": "olmoe",
        "hidden_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "clip_qkv": 0.7,
    },
    "glm4_moe": {
        "model_type": "glm4_moe",
        "head_dim": 8,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 12,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "n_group": 4,
        "topk_group": 2,
        "use_qk_norm": True,
        "attention_bias": True,
        "num_nextn_predict_layers": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    },
    "deepseek_v2": {
        "model_type": "deepseek_v2",
        "hidden_size": 32,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        **MLA,
        "topk_method": "group_limited_greedy",
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.5},
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "q_lora_rank": 14,
        **MLA,
        "first_k_dense_replace": 2,
        "rms_norm_eps": 1e-4,
        "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.8},
    },
    "deepseek_v3-halves": {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        **MLA,
        "rope_interleave": False,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "head_dim": 8,
        "sliding_window": 4,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "swiglu_limit": 0.4,
        "swiglu_alpha": 1.3,
        "rope_parameters": YARN | {"truncate": False, "beta_fast": 3.0, "beta_slow": 0.5},
    },
    "gpt_neox": {
        "model_type": "gpt_neox",
        "hidden_size": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    },
    "pythia-sequential": {"model_type": "gpt_neox", "hidden_size": 32, "use_parallel_residual": False},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 4,
        "n_positions": 16,
        "n_inner": 20,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
}
_GPT2 = ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")


@contextmanager
def in_fp64() -> Iterator[None]:
    """Within, whatever transformers computes in fp32 for safety's sake it computes in fp64."""
    import torch._inductor.compile_fx  # modules that are imported within would never know fp32

    before = torch.get_default_dtype(), torch.float32, torch.float, torch.Tensor.float
    try:
        torch.set_default_dtype(torch.float64)
        torch.float32 = torch.float = torch.float64
        torch.Tensor.float = torch.Tensor.double
        yield
    finally:
        torch.set_default_dtype(before[0])
        torch.float32, torch.float, torch.Tensor.float = before[1:]


PLANNED: dict[str, dict[str, Any]] = {
    "gemma": {"model_type": "gemma", "head_dim": 10, "tie_word_embeddings": True},
    "granite": {"model_type": "granite", "hidden_size": 32, "logits_scaling": 3.0, "residual_multiplier": 0.5},
    "helium": {"model_type": "helium", "hidden_size": 32, "head_dim": 8},
    "seed_oss": {"model_type": "seed_oss", "head_dim": 8, "attention_dropout": 0.0, "residual_dropout": 0.0},
}
"""Models that `parallelize` has plans for, and `--init-from` does not read."""


def build(name: str) -> Any:
    """The model, with every parameter drawn at random: zero biases and unit norms hide mistakes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoConfig, AutoModelForCausalLM
    special = {**FAMILIES, **PLANNED}[name]
    kept = {"gpt2": _GPT2, "gpt_neox": TINY.keys() - {"num_key_value_heads"}}.get(special["model_type"], TINY)
    base = {k: v for k, v in TINY.items() if k in kept}
    config = AutoConfig.for_model(**{**base, **special})
    config._experts_implementation = "eager"  # torch's grouped GEMM takes no fp64
    with in_fp64():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for key, param in sorted(model.named_parameters()):
                param.copy_(0.3 * torch.randn(param.shape, generator=generator) + 0.5 * ("norm" in key or "ln_" in key))
            for key, bias in model.named_buffers():
                if key.endswith("e_score_correction_bias"):
                    bias.data = 0.3 * torch.randn(bias.shape, generator=generator, dtype=torch.float64)
    return model.eval()


def rows(vocab: int = 53) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and a mask [b, s]; one row is masked whole."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocab, (ROWS, SEQ + 1), generator=generator)
    mask = torch.rand(ROWS, SEQ, generator=generator) > 0.3
    mask[0] = False
    return tokens[:, :-1], tokens[:, 1:], mask


def run(model: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits [b, s, V], the mean loss over what the mask leaves, and all gradients by their names in a file."""
    tokens, labels, mask = rows()
    with in_fp64():
        logits = model(tokens, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        loss = (losses * mask).sum() / mask.sum()
        model.zero_grad()
        loss.backward()
    return logits.detach(), loss.detach(), in_files({name: p.grad for name, p in model.named_parameters()}, model)


def weights_of(model: Any) -> dict[str, Tensor]:
    """All weights by their names in a file; those of a router's bias, which is none in memory, among them."""
    biases = {name: b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}
    return in_files({name: p.detach() for name, p in model.named_parameters()} | biases, model)


def in_files(tensors: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Files have each expert by itself, where transformers stacks them in memory."""
    found: dict[str, Tensor] = {}
    mixtral = model.config.model_type == "mixtral"
    if model.config.model_type == "gpt_oss":  # there they are stacked
        return tensors
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    for name, tensor in tensors.items():
        said = name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name
        where, _, kind = said.rpartition(".")
        if not where.endswith(".experts"):
            found[said] = tensor
            continue
        for n, each in enumerate(tensor):
            parts = each.chunk(2) if kind == "gate_up_proj" else (each,)
            for part, short in zip(parts, names[:2] if len(parts) == 2 else names[2:], strict=True):
                found[f"{where}.{n}.{short}.weight"] = part
    return found


def save(model: Any, directory: Path, dtype: torch.dtype = torch.float32, shard: str = "50GB") -> None:
    """As a directory that its users would have."""
    directory.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)


def write_config(model: Any, directory: Path) -> None:
    """Its config.json alone."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(model.config.to_dict()))
