"""Megatron-LM's flags: what each is here. Flags that need arithmetic are in `translate.py`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from stretto.arguments.setting import Value

DEFAULTS: Final[Mapping[str, Value]] = MappingProxyType(
    {
        "model.norm": "layer",
        "model.bias": True,
        "model.tied": True,
        "model.dropout": 0.1,
        "optimizer.min_lr": 0.0,
        "optimizer.warmup_steps": 0,
        "optimizer.weight_decay": 0.01,
        "optimizer.beta2": 0.999,
        "data.held_out": 0.031,
        "checkpoint.keep_every": 1,
        "run.device": "cuda",
        "run.log_every": 100,
        "run.eval_every": 1000,
        "run.eval_batches": 100,
    }
)
"""What a script that does not say otherwise gets from Megatron-LM, where Stretto's default is another."""

REQUIRED: Final = ("--num-layers", "--hidden-size", "--num-attention-heads", "--seq-length", "--micro-batch-size")
"""Flags without which Megatron-LM does not start."""

UNSAID: Final[Mapping[str, str]] = MappingProxyType({"--lr": "optimizer.lr", "--train-iters": "run.steps"})
"""Flags that Megatron-LM cannot train without, and the settings of ours that count where they are missing."""

LEARNING_RATE: Final = (
    "Megatron-LM's learning rate is one step behind: its update u takes the rate of step u-1, so the first takes that "
    "of step 0, which is 0 where there is a warm-up; here update u takes the rate of step u"
)
RECOMPUTE: Final = (
    "Megatron-LM's selective recomputation is that of attention; here attention never keeps its weights, and "
    "--recompute selective computes norms and activation functions again, to the same bits"
)

SAME: Final[Mapping[str, str]] = MappingProxyType(
    {
        "--num-layers": "model.layers",
        "--hidden-size": "model.hidden",
        "--num-attention-heads": "model.heads",
        "--kv-channels": "model.head_dim",
        "--vocab-size": "model.vocab",
        "--norm-epsilon": "model.norm_eps",
        "--init-method-std": "model.init_std",
        "--num-experts": "model.experts",
        "--moe-router-topk": "model.top_k",
        "--moe-ffn-hidden-size": "model.expert_ffn",
        "--moe-shared-expert-intermediate-size": "model.shared_ffn",
        "--moe-router-topk-scaling-factor": "model.router_scale",
        "--moe-router-num-groups": "model.router_groups",
        "--moe-router-group-topk": "model.router_top_groups",
        "--moe-router-bias-update-rate": "model.router_bias_rate",
        "--moe-z-loss-coeff": "model.router_z_loss",
        "--hidden-dropout": "model.dropout",
        "--tensor-model-parallel-size": "parallel.tp",
        "--pipeline-model-parallel-size": "parallel.pp",
        "--context-parallel-size": "parallel.cp",
        "--expert-model-parallel-size": "parallel.ep",
        "--expert-tensor-parallel-size": "parallel.etp",
        "--seq-length": "batch.seq_len",
        "--micro-batch-size": "batch.micro_batch",
        "--global-batch-size": "batch.global_batch",
        "--lr": "optimizer.lr",
        "--min-lr": "optimizer.min_lr",
        "--weight-decay": "optimizer.weight_decay",
        "--adam-beta1": "optimizer.beta1",
        "--adam-beta2": "optimizer.beta2",
        "--adam-eps": "optimizer.eps",
        "--sgd-momentum": "optimizer.momentum",
        "--clip-grad": "optimizer.clip_grad",
        "--seed": "run.seed",
        "--log-interval": "run.log_every",
        "--eval-interval": "run.eval_every",
        "--save": "checkpoint.out",
        "--save-interval": "checkpoint.save_every",
        "--save-retain-interval": "checkpoint.keep_every",
    }
)
"""Flags whose value goes over as it stands."""

SWITCHES: Final[Mapping[str, tuple[str, Value]]] = MappingProxyType(
    {
        "--disable-bias-linear": ("model.bias", False),
        "--add-qkv-bias": ("model.qkv_bias", True),
        "--untie-embeddings-and-output-weights": ("model.tied", False),
        "--moe-router-enable-expert-bias": ("model.router_bias", True),
        "--moe-shared-expert-gate": ("model.shared_gate", True),
        "--qk-layernorm": ("model.qk_norm", True),
        "--bf16": ("run.dtype", "bf16"),
        "--deterministic-mode": ("run.deterministic", True),
        "--use-tp-pp-dp-mapping": ("parallel.order", "tp-cp-ep-pp-dp"),
    }
)
"""Flags without a value, and what each sets."""

_DATA = "name text with --data: a directory of files, a .jsonl, or the .bin that preprocess_data.py made"
_RESUME = "say --resume once the directory of the run has a checkpoint"
_TOKENIZER = "name a tokenizer.json with --tokenizer"

BY_HAND: Final[Mapping[str, str]] = MappingProxyType(
    {
        **dict.fromkeys(("--data-path", "--train-data-path", "--valid-data-path", "--mock-data"), _DATA),
        **dict.fromkeys(("--tokenizer-type", "--tokenizer-model", "--vocab-file", "--merge-file"), _TOKENIZER),
        "--tiktoken-pattern": _TOKENIZER,
        "--nccl-communicator-config-path": "say --min-ctas and --max-ctas, by axis",
        **dict.fromkeys(("--test-data-path", "--data-args-path", "--per-split-data-args-path"), _DATA),
        "--vocab-extra-ids": _TOKENIZER,
        "--overlap-moe-expert-parallel-comm": "say --ep-comm-overlap: half a microbatch computes meanwhile",
        **dict.fromkeys(("--use-checkpoint-args", "--use-mp-args-from-checkpoint-args"), _RESUME),
        "--pretrained-checkpoint": "say --init-from with the directory of a Hugging Face model",
        "--load": _RESUME,
    }
)
"""Flags that name files, and what to say instead."""

_BALANCING = "say --moe-router-load-balancing-type aux_loss, or none with --moe-router-enable-expert-bias"
_DECOUPLED = "say --param-groups '*embed_tokens*|lm_head*: lr=FACTOR', which multiplies the rate of both, its end too"
_PROFILED = "say --profile steps=10:13"
_DEEPSPEED = "DeepSpeed's file is not read: say --sharding zero1, zero2 or fsdp for its ZeRO stage 1, 2 or 3"
_LATENT = "it is not translated: say --kv-lora-rank, --q-lora-rank, --head-dim and --rope-head-dim"
_OF_LATENT = "latent attention is not translated: say"
_DOCUMENTS = "say --packing: whole documents in a row, which do not see each other"
_CLAMPED = "say --activation clamped-swiglu for that of gpt-oss"
_SPLIT = "layers are dealt to stages by what they take, embedding and head included; or say --stage-layers"
_ALL_LAYERS = "with fp8 the matrices of all layers are in it"

MISSING: Final[Mapping[str, str]] = MappingProxyType(
    {
        "--moe-input-jitter-eps": "what enters a router is not disturbed",
        "--moe-pad-expert-input-to-capacity": "no row is padded",
        "--moe-latent-size": "experts work at the hidden size",
        "--multi-latent-attention": _LATENT,
        **{flag: f"{_OF_LATENT} {flag}" for flag in ("--q-lora-rank", "--kv-lora-rank", "--v-head-dim")},
        "--qk-head-dim": f"{_OF_LATENT} --head-dim, the sum of it and --qk-pos-emb-head-dim",
        "--qk-pos-emb-head-dim": f"{_OF_LATENT} --rope-head-dim",
        "--rotary-scaling-factor": f"{_OF_LATENT} --rope-scaling yarn --rope-factor",
        "--mscale": f"{_OF_LATENT} --rope-mscale",
        "--mscale-all-dim": f"{_OF_LATENT} --rope-mscale-all",
        **dict.fromkeys(("--reset-position-ids", "--reset-attention-mask"), _DOCUMENTS),
        "--eod-mask-loss": "the token that ends a document is learned, too",
        "--moe-router-force-load-balancing": "routers choose; made-up loads are for benchmarks",
        "--moe-router-topk-limited-devices": "say --moe-router-num-groups and --moe-router-group-topk",
        "--moe-extended-tp": "say --expert-tensor-parallel-size",
        "--moe-apply-probs-on-input": "outputs of experts are weighted, not what enters them",
        "--rotary-interleaved": "a feature turns with the one half of the rotated features away",
        **dict.fromkeys(("--window-size", "--window-attn-skip-freq"), "say --window and --global-layers"),
        "--softmax-type": "say --attention-sinks for learnable",
        **dict.fromkeys(("--quick-geglu", "--glu-linear-offset", "--activation-func-clamp-value"), _CLAMPED),
        "--fp32-residual-connection": "the residual is in the dtype of the run",
        "--fp4-format": "there is fp8: --fp8 tensorwise or rowwise",
        **dict.fromkeys(("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"), _SPLIT),
        "--sft": "say --format chat",
        "--ckpt-step": "a run goes on from its newest whole checkpoint",
        "--skip-train": "--steps says how many updates are made",
        **dict.fromkeys(("--use-pytorch-profiler", "--profile-ranks", "--record-memory-history"), _PROFILED),
        **dict.fromkeys(("--first-last-layers-bf16", "--num-layers-at-start-in-bf16"), _ALL_LAYERS),
        "--num-layers-at-end-in-bf16": _ALL_LAYERS,
        "--no-fp8-wgrad": "with one scale for a tensor all three GEMMs are in fp8; say --fp8 rowwise in its place",
        "--fp8-param-gather": "with --fp8 tensorwise --sharding fsdp weights are gathered in fp8, else in bf16",
        "--num-distributed-optimizer-instances": "say --dp-shard, the ranks that share one copy of the state",
        **dict.fromkeys(("--deepspeed", "--deepspeed_config", "--deepspeed-config", "--zero-stage"), _DEEPSPEED),
        "--fp16": "fp16 with loss scaling is not available; bf16 needs no scaling",
        "--rampup-batch-size": "the global batch has one size for the whole run",
        "--squared-relu": "the activations are swiglu, gelu and gelu-tanh",
        "--grad-reduce-in-bf16": "sums of gradients are in fp32: say --reduce-dtype bf16, and what is sent is in bf16",
        "--decoupled-lr": _DECOUPLED,
        "--decoupled-min-lr": _DECOUPLED,
        "--no-load-optim": "a checkpoint is loaded whole",
        "--no-load-rng": "a checkpoint is loaded whole",
        "--finetune": "a run begins anew or goes on from its own checkpoint",
        "--exit-interval": "a run ends after its steps, or when it is told to by a signal",
        "--start-weight-decay": "weight decay is constant",
        "--end-weight-decay": "weight decay is constant",
        "--profile": _PROFILED,
        "--profile-step-start": _PROFILED,
        "--profile-step-end": _PROFILED,
    }
)
"""Flags for what Stretto does not do: rejected, since a run without them would be another one."""

ONLY: Final[Mapping[str, tuple[tuple[str, ...], str]]] = MappingProxyType(
    {
        "--rerun-mode": (("disabled",), "steps are not run again to find faulty hardware; see --check-replicas"),
        "--weight-decay-incr-style": (("constant",), "weight decay is constant"),
        "--lr-warmup-init": (("0", "0.0", "0.", "0e0"), "a warm-up begins at 0"),
    }
)
"""Flags that say what is so anyway, and are rejected with any other value."""
