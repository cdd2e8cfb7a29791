"""Megatron-LM's flags that change nothing here, and why."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

_LAUNCHER = "belongs to the launcher: torchrun, srun and mpirun are understood"
_KERNELS = "chooses among implementations of the same arithmetic; there is one here"
_ALWAYS = "is always so here"
_BLOCKS = "each block is computed again by itself, with the same numbers"
_SCALED_NOW = "a scale is that of the tensor as it is, without a history"
_MESSAGES = "chooses how communication is cut and launched, not what is computed"
_GRAPHS = "says how kernels are launched: --cuda-graphs is for that here"
_SAVES = "saves are asynchronous and written by all ranks, unless --no-async-save"
_WHOLE = "a checkpoint is saved whole"
_START = "initial weights are drawn on the run's device, the same in every layout"
_TELLS = "a slow, silent or dead rank is named, always"
_FINITE = "a loss or gradient that is no number ends the run, unless --on-nonfinite skip"
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
        **dict.fromkeys(
            ("--cross-entropy-fusion-impl", "--moe-use-legacy-grouped-gemm", "--moe-deepep-num-sms"), _KERNELS
        ),
        **dict.fromkeys(("--moe-router-padding-for-quantization", "--apply-query-key-layer-scaling"), _KERNELS),
        **dict.fromkeys(
            ("--num-dataset-builder-threads", "--mid-level-dataset-surplus", "--enable-experimental"), _KERNELS
        ),
        **dict.fromkeys(("--dataloader-fast-cache-load", "--dataloader-defer-npy-index-mmap"), _KERNELS),
        **dict.fromkeys(("--enable-cuda-graph", "--external-cuda-graph", "--cuda-graph-impl"), _GRAPHS),
        **dict.fromkeys(("--cuda-graph-scope", "--cuda-graph-warmup-steps", "--te-rng-tracker"), _GRAPHS),
        **dict.fromkeys(("--async-save", "--ckpt-fully-parallel-save", "--ckpt-fully-parallel-load"), _SAVES),
        **dict.fromkeys(("--ckpt-assume-constant-structure", "--use-persistent-ckpt-worker"), _SAVES),
        **dict.fromkeys(("--use-dist-ckpt", "--no-ckpt-fully-parallel-save", "--auto-detect-ckpt-format"), _SAVES),
        "--dist-ckpt-strictness": "a tensor that is missing or left over is an error, always",
        "--exit-on-missing-checkpoint": "--resume without a checkpoint is an error, always",
        **dict.fromkeys(("--no-save-optim", "--no-save-rng"), _WHOLE),
        **dict.fromkeys(("--wandb-entity", "--log-memory-to-tensorboard", "--log-learning-rate-to-tensorboard"), _LOGS),
        **dict.fromkeys(("--log-validation-ppl-to-tensorboard", "--log-batch-size-to-tensorboard"), _LOGS),
        **dict.fromkeys(("--log-world-size-to-tensorboard", "--log-loss-scale-to-tensorboard"), _LOGS),
        **dict.fromkeys(("--no-log-loss-scale-to-tensorboard", "--tensorboard-log-interval", "--logging-level"), _LOGS),
        **dict.fromkeys(("--timing-log-level", "--timing-log-option", "--log-energy", "--log-memory-interval"), _LOGS),
        **dict.fromkeys(("--no-barrier-with-level-1-timing", "--barrier-with-L1-time", "--train-sync-interval"), _LOGS),
        **dict.fromkeys(("--log-straggler", "--straggler-minmax-count", "--disable-straggler-on-startup"), _TELLS),
        **dict.fromkeys(("--enable-ft-package", "--calc-ft-timeouts"), _TELLS),
        **dict.fromkeys(("--no-check-for-nan-in-loss-and-grad", "--check-for-nan-in-loss-and-grad"), _FINITE),
        **dict.fromkeys(
            ("--tp-comm-overlap-cfg", "--tp-comm-bootstrap-backend", "--disable-tp-comm-overlap-ag"), _MESSAGES
        ),
        **dict.fromkeys(("--disable-tp-comm-overlap-rs", "--disable-tp-comm-bulk-dgrad"), _MESSAGES),
        **dict.fromkeys(("--disable-tp-comm-bulk-wgrad", "--tp-comm-overlap-rs-dgrad"), _MESSAGES),
        **dict.fromkeys(("--no-async-tensor-model-parallel-allreduce", "--no-overlap-p2p-communication"), _MESSAGES),
        **dict.fromkeys(
            ("--overlap-p2p-communication-warmup-flush", "--ddp-bucket-size", "--ddp-num-buckets"), _MESSAGES
        ),
        **dict.fromkeys(("--ddp-average-in-collective", "--ddp-pad-buckets-for-high-nccl-busbw"), _MESSAGES),
        **dict.fromkeys(("--no-align-grad-reduce", "--no-align-param-gather", "--align-param-gather"), _MESSAGES),
        **dict.fromkeys(("--no-gradient-reduce-div-fusion", "--use-nccl-ub", "--nccl-ub", "--use-sharp"), _MESSAGES),
        **dict.fromkeys(("--suggested-communication-unit-size", "--fsdp-double-buffer", "--lazy-mpu-init"), _MESSAGES),
        **dict.fromkeys(("--disable-gloo-process-groups", "--enable-gloo-process-groups"), _MESSAGES),
        **dict.fromkeys(("--defer-embedding-wgrad-compute", "--wgrad-deferral-limit"), _MESSAGES),
        **dict.fromkeys(("--use-cpu-initialization", "--init-model-with-meta-device"), _START),
        "--recompute-modules": "--recompute chooses what is computed again: norms and activation functions, or blocks",
        **dict.fromkeys(("--fp8-amax-history-len", "--fp8-amax-compute-algo", "--fp8-interval"), _SCALED_NOW),
        "--fp8-margin": _SCALED_NOW,
        **dict.fromkeys(("--moe-grouped-gemm", "--moe-permute-fusion", "--moe-token-dispatcher-type"), _KERNELS),
        **dict.fromkeys(("--moe-router-fusion", "--moe-router-padding-for-fp8", "--moe-enable-deepep"), _KERNELS),
        **dict.fromkeys(("--moe-flex-dispatcher-backend", "--moe-hybridep-num-sms"), _KERNELS),
        "--moe-router-dtype": "scores are in fp32 or wider, always",
        "--moe-layer-recompute": "--recompute says what is computed again",
        "--moe-shared-expert-overlap": "shared experts are computed while tokens travel, always",
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
