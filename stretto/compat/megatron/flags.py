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

_LAUNCHER = "belongs to the launcher: torchrun, srun and mpirun are understood"
_KERNELS = "chooses among implementations of the same arithmetic; there is one here"
_ALWAYS = "is always so here"
_BLOCKS = "each block is computed again by itself, with the same numbers"
_SCALED_NOW = "a scale is that of the tensor as it is, without a history"
_LOGS = "metrics always go to metrics.jsonl and TensorBoard files in the directory of the run"

MOOT: Final[Mapping[str, str]] = MappingProxyType(
    {
        **dict.fromkeys(("--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port"), _LAUNCHER),
        **dict.fromkeys(("--distributed-backend", "--local-rank", "--rdzv-backend", "--rdzv-endpoint"), _LAUNCHER),
        **dict.fromkeys(("--transformer-impl", "--use-mcore-models", "--attention-backend"), _KERNELS),
        **dict.fromkeys(("--use-flash-attn", "--no-masked-softmax-fusion"), _KERNELS),
        **dict.fromkeys(("--no-bias-swiglu-fusion", "--no-bias-dropout-fusion", "--no-rope-fusion"), _KERNELS),
        **dict.fromkeys(("--no-gradient-accumulation-fusion", "--cross-entropy-loss-fusion"), _KERNELS),
        **dict.fromkeys(("--no-persist-layer-norm", "--bias-swiglu-fusion", "--use-legacy-models"), _KERNELS),
        **dict.fromkeys(("--attention-softmax-in-fp32", "--no-create-attention-mask-in-dataloader"), _KERNELS),
        **dict.fromkeys(("--num-workers", "--no-mmap-bin-files", "--data-cache-path", "--dataloader-type"), _KERNELS),
        **dict.fromkeys(("--tensorboard-dir", "--log-throughput", "--tensorboard-queue-size"), _LOGS),
        **dict.fromkeys(("--log-timers-to-tensorboard", "--log-params-norm", "--log-num-zeros-in-grad"), _LOGS),
        **dict.fromkeys(("--wandb-project", "--wandb-exp-name", "--wandb-save-dir", "--log-progress"), _LOGS),
        **dict.fromkeys(("--overlap-grad-reduce", "--tp-comm-overlap", "--calculate-per-token-loss"), _ALWAYS),
        **dict.fromkeys(("--overlap-param-gather", "--overlap-cpu-optimizer-d2h-h2d"), _ALWAYS),
        **dict.fromkeys(("--use-torch-optimizer-for-cpu-offload",), "the device computes the update, here as there"),
        **dict.fromkeys(("--no-pin-cpu-grads", "--no-pin-cpu-params"), "what lies in the host's memory is pinned"),
        **dict.fromkeys(("--accumulate-allreduce-grads-in-fp32", "--use-checkpoint-opt_param-scheduler"), _ALWAYS),
        **dict.fromkeys(("--recompute-method", "--recompute-num-layers"), _BLOCKS),
        "--recompute-modules": "--recompute chooses what is computed again: norms and activation functions, or blocks",
        **dict.fromkeys(("--fp8-amax-history-len", "--fp8-amax-compute-algo", "--fp8-interval"), _SCALED_NOW),
        "--fp8-margin": _SCALED_NOW,
        **dict.fromkeys(("--moe-grouped-gemm", "--moe-permute-fusion", "--moe-token-dispatcher-type"), _KERNELS),
        **dict.fromkeys(("--moe-router-fusion", "--moe-router-padding-for-fp8", "--moe-enable-deepep"), _KERNELS),
        **dict.fromkeys(("--moe-flex-dispatcher-backend", "--moe-hybridep-num-sms"), _KERNELS),
        "--moe-router-dtype": "scores are in fp32 or wider, always",
        "--moe-layer-recompute": "--recompute says what is computed again",
        "--moe-shared-expert-overlap": "shared experts are computed while tokens travel, always",
        "--overlap-moe-expert-parallel-comm": "say --ep-comm-overlap: half a microbatch computes meanwhile",
        "--delay-wgrad-compute": "a weight gradient of experts is computed while gradients of rows travel, always",
        "--moe-per-layer-logging": _LOGS,
        "--max-position-embeddings": "positions reach as far as seq_len",
        "--make-vocab-size-divisible-by": "the vocabulary need not divide, and checkpoints hold it unpadded",
        "--no-position-embedding": "goes with rotary positions, which have no table",
        "--apply-layernorm-1p": "a gain that is stored less one gets the same updates: neither is decayed",
        "--ckpt-format": "checkpoints are torch.distributed.checkpoint's",
        "--exit-signal-handler": "SIGTERM always leads to a save and an end that all ranks agree on",
        "--manual-gc": "is about Python's garbage collector, not about the run",
        "--manual-gc-interval": "is about Python's garbage collector, not about the run",
        "--empty-unused-memory-level": "the allocator keeps its memory",
        "--override-opt_param-scheduler": "the command line is always stronger than a checkpoint",
    }
)
"""Flags that change nothing here, and why."""

_DATA = "name text with --data: a directory of files, a .jsonl, or the .bin that preprocess_data.py made"
_TOKENIZER = "name a tokenizer.json with --tokenizer"

BY_HAND: Final[Mapping[str, str]] = MappingProxyType(
    {
        **dict.fromkeys(("--data-path", "--train-data-path", "--valid-data-path", "--mock-data"), _DATA),
        **dict.fromkeys(("--tokenizer-type", "--tokenizer-model", "--vocab-file", "--merge-file"), _TOKENIZER),
        "--tiktoken-pattern": _TOKENIZER,
        "--nccl-communicator-config-path": "say --min-ctas and --max-ctas, by axis",
        "--load": "say --resume once the directory of the run has a checkpoint",
    }
)
"""Flags that name files, and what to say instead."""

_BALANCING = "say --moe-router-load-balancing-type aux_loss, or none with --moe-router-enable-expert-bias"
_DECOUPLED = "say --param-groups '*embed_tokens*|lm_head*: lr=FACTOR', which multiplies the rate of both, its end too"
_PROFILED = "say --profile steps=10:13"
_DEEPSPEED = "DeepSpeed's file is not read: say --sharding zero1, zero2 or fsdp for its ZeRO stage 1, 2 or 3"
_ALL_LAYERS = "with fp8 the matrices of all layers are in it"

MISSING: Final[Mapping[str, str]] = MappingProxyType(
    {
        "--moe-input-jitter-eps": "what enters a router is not disturbed",
        "--moe-pad-expert-input-to-capacity": "no row is padded",
        "--moe-latent-size": "experts work at the hidden size",
        "--multi-latent-attention": "its flags are not translated: say --kv-lora-rank, --rope-head-dim and --head-dim",
        **dict.fromkeys(("--first-last-layers-bf16", "--num-layers-at-start-in-bf16"), _ALL_LAYERS),
        "--num-layers-at-end-in-bf16": _ALL_LAYERS,
        "--no-fp8-wgrad": "with one scale for a tensor all three products are in fp8; say --fp8 rowwise in its place",
        "--fp8-param-gather": "weights are gathered in bf16",
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
