"""Configurations of other trainers, which are not converted: by what they are known, and what their words are here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Trainer:
    """Another trainer. `mark` is found in its files and scripts alone; `words` are what its settings are here."""

    name: str
    mark: str
    words: Mapping[str, str]


_BETAS = "--beta1, --beta2"
_SHARD = "--sharding fsdp; --dp is shards times replicas, --dp-shard the shards where they are fewer"

OTHERS: Final = (
    Trainer(
        "torchtitan",
        r"torchtitan|data_parallel_shard_degree|\[activation_checkpoint\]|--job\.config",
        {
            "flavor": "--preset",
            "hf_assets_path": "--tokenizer, and --init-from for the weights",
            "tokenizer_path": "--tokenizer",
            "data_parallel_shard_degree": _SHARD,
            "data_parallel_replicate_degree": _SHARD,
            "tensor_parallel_degree": "--tp",
            "enable_async_tensor_parallel": "--tp-comm-overlap, by itself on GPUs of one host",
            "pipeline_parallel_degree": "--pp",
            "pipeline_parallel_schedule": "--schedule, by the names of `stretto schedule list`, and --vpp",
            "context_parallel_degree": "--cp",
            "expert_parallel_degree": "--ep",
            "expert_tensor_parallel_degree": "--etp",
            "local_batch_size": "--micro-batch times the microbatches of a step",
            "global_batch_size": "--global-batch",
            "seq_len": "--seq-len",
            "steps": "--steps",
            "max_norm": "--clip-grad",
            "dataset": "--data, with files that are here",
            "dataset_path": "--data",
            "mixed_precision_param": "--dtype",
            "lr": "--lr",
            "warmup_steps": "--warmup-steps",
            "decay_type": "--lr-schedule",
            "decay_ratio": "--lr-schedule wsd --cooldown-steps, a number of steps",
            "min_lr_factor": "--min-lr, a rate and no factor",
            "dump_folder": "--out",
            "interval": "--save-every",
            "keep_latest_k": "--keep",
            "async_mode": "--async-save",
            "initial_load_path": "--init-from",
            "selective_ac_option": "--recompute selective",
            "enable_fsdp_float8_all_gather": "--fp8 tensorwise: with --sharding fsdp weights are then gathered in FP8",
            "recipe_name": "--fp8 tensorwise or rowwise",
            "log_freq": "--log-every",
        },
    ),
    Trainer(
        "nanotron",
        r"nanotron|hf_dataset_or_datasets|batch_accumulation_per_replica",
        {
            "dp": "--dp",
            "tp": "--tp",
            "pp": "--pp",
            "cp": "--cp",
            "expert_parallel_size": "--ep",
            "pp_engine": "--schedule gpipe or 1f1b",
            "tp_mode": "--sequence-parallel for REDUCE_SCATTER",
            "tp_linear_async_communication": "--tp-comm-overlap, by itself on GPUs of one host",
            "zero_stage": "--sharding zero1",
            "micro_batch_size": "--micro-batch",
            "batch_accumulation_per_replica": "--global-batch: micro batch times dp times this",
            "sequence_length": "--seq-len",
            "train_steps": "--steps",
            "checkpoint_interval": "--save-every",
            "checkpoints_path": "--out",
            "resume_checkpoint_path": "--resume",
            "hf_dataset_or_datasets": "--data, with files that are here",
            "tokenizer_name_or_path": "--tokenizer",
            "hidden_size": "--hidden",
            "num_hidden_layers": "--layers",
            "num_attention_heads": "--heads",
            "num_key_value_heads": "--kv-heads",
            "intermediate_size": "--ffn",
            "vocab_size": "--vocab",
            "tie_word_embeddings": "--tied",
            "rope_theta": "--rope-base",
            "rms_norm_eps": "--norm-eps",
            "learning_rate": "--lr",
            "min_decay_lr": "--min-lr",
            "lr_warmup_steps": "--warmup-steps",
            "lr_decay_steps": "--decay-steps, counted from the first step",
            "lr_decay_style": "--lr-schedule",
            "weight_decay": "--weight-decay",
            "clip_grad": "--clip-grad",
            "adam_beta1": "--beta1",
            "adam_beta2": "--beta2",
        },
    ),
    Trainer(
        "DeepSpeed",
        r"zero_optimization|train_micro_batch_size_per_gpu|--deepspeed\b|--zero-stage\b|\bdeepspeed ",
        {
            "train_batch_size": "--global-batch",
            "train_micro_batch_size_per_gpu": "--micro-batch",
            "gradient_accumulation_steps": "--global-batch: micro batch times dp times this",
            "stage": "--sharding zero1, zero2 or fsdp for 1, 2 and 3",
            "zero_optimization": "--sharding",
            "overlap_comm": "always so",
            "offload_optimizer": "--optimizer-cpu-offload",
            "gradient_clipping": "--clip-grad",
            "bf16": "--dtype bf16",
            "lr": "--lr",
            "betas": _BETAS,
            "weight_decay": "--weight-decay",
            "warmup_num_steps": "--warmup-steps",
            "warmup_max_lr": "--lr",
            "total_num_steps": "--decay-steps",
            "activation_checkpointing": "--recompute block",
        },
    ),
    Trainer(
        "a trainer of transformers",
        r"per_device_train_batch_size|accelerate launch",
        {
            "model_name_or_path": "--init-from, a directory",
            "train_file": "--data",
            "dataset_name": "--data, with files that are here",
            "per_device_train_batch_size": "--micro-batch",
            "gradient_accumulation_steps": "--global-batch: micro batch times dp times this",
            "learning_rate": "--lr",
            "num_train_epochs": "--steps",
            "max_steps": "--steps",
            "warmup_steps": "--warmup-steps",
            "lr_scheduler_type": "--lr-schedule",
            "weight_decay": "--weight-decay",
            "max_grad_norm": "--clip-grad",
            "bf16": "--dtype bf16",
            "gradient_checkpointing": "--recompute block",
            "fsdp": "--sharding fsdp",
            "output_dir": "--out",
            "save_steps": "--save-every",
            "logging_steps": "--log-every",
            "eval_steps": "--eval-every",
        },
    ),
)


def of_another(text: str) -> str | None:
    """What a text of another trainer says, word by word, in flags of ours; None where no trainer is recognized."""
    found = next((each for each in OTHERS if re.search(each.mark, text)), None)
    if found is None:
        return None
    said = {word: ours for word, ours in found.words.items() if re.search(rf"\b{word}\b", text)}
    width = max(map(len, said), default=0)
    lines = [f"  {word:<{width}}  {ours}" for word, ours in said.items()]
    head = f"this is of {found.name}, and scripts of Megatron-LM alone are converted"
    told = [f"{head}; what it says is here:", *lines, "whatever else it says is not known here"]
    return "\n".join(told) if said else head
