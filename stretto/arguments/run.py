"""How long a run is, on what, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stretto.arguments.setting import setting


@dataclass(frozen=True)
class RunConfig:
    """How long, on what, and what to report."""

    steps: int = setting(150, "optimizer steps of the whole run", unit="steps", at_least=1, at_most=2**40)
    seed: int = setting(1234, "everything random follows from it", at_least=0, at_most=2**63 - 1)
    nproc: int | None = setting(
        None,
        "world size: processes of the run, started on this machine unless a launcher did",
        unit="ranks",
        at_least=1,
    )
    device: Literal["cpu", "cuda"] = setting("cpu", "where tensors live")
    dtype: Literal["fp32", "bf16", "fp64"] = setting(
        "fp32", "type of weights and activations; masters and gradients are fp32 or wider"
    )
    fp8: Literal["none", "tensorwise", "rowwise"] = setting(
        "none",
        "GEMMs of attention and feed-forward in FP8, with one scale for a tensor, or one for each "
        "row in forward and input gradient; weights, masters and all else stay what they are",
    )
    attention: Literal["torch", "flash4"] = setting(
        "torch",
        "whose kernels compute attention: torch's, the quickest first that takes the shapes, or those of the package "
        "flash-attn-4, which must be installed",
    )
    compile: bool | None = setting(
        None,
        "one kernel for each chain of elementwise operations, by torch.compile; unset: on GPUs",
        carried=False,
    )
    cuda_graphs: bool | None = setting(
        None,
        "forward and backward of a microbatch are one CUDA graph, which the host launches at once, with the same "
        "kernels; unset: wherever they can be recorded",
        carried=False,
    )
    recompute: Literal["none", "selective", "block", "offload"] = setting(
        "none",
        "what the backward computes once more instead of keeping it, to the same bits; selective: outputs of norms and "
        "activation functions; block: all but what enters each block; offload: the same, and that waits in the host's "
        "memory",
    )
    ffn_chunks: int = setting(
        1,
        "feed-forward takes the sequence in so many chunks and computes each once more in the backward, so that its "
        "inner activations exist of one at a time; 1: as a whole",
        at_least=1,
        at_most=2**16,
        carried=False,
    )
    progress: Literal["auto", "live", "lines", "none"] = setting(
        "auto",
        "live: two lines of a terminal, kept up to date; lines: one for each report; auto: live at a terminal that the "
        "command was started from, by no MPI launcher",
        carried=False,
    )
    log_every: int = setting(1, "report a line every so many steps", unit="steps", at_least=1)
    eval_every: int = setting(
        0, "evaluate on held-out text every so many steps; 0: at the end only", unit="steps", at_least=0
    )
    eval_batches: int = setting(8, "global batches of one evaluation, of each validation set; 0: all of it", at_least=0)
    sample_tokens: int = setting(
        0,
        "continue a prompt by so many tokens when the run ends; 0: do not",
        unit="tokens",
        at_least=0,
        at_most=2**20,
    )
    sample_prompt: str = setting("def ", "the prompt that is continued")
    timeout: float = setting(600.0, "a collective that takes longer ends the run", unit="seconds", above=0)
    exit_duration: float | None = setting(
        None,
        "after so long the run saves and ends with exit code 75, to be started again with --resume",
        unit="seconds",
        above=0,
        carried=False,
    )
    check_collectives: bool = setting(
        False,
        "compare each communication on all its ranks before it begins: slow, and says which rank hangs the others",
        carried=False,
    )
    on_nonfinite: Literal["stop", "trace", "skip"] = setting(
        "stop",
        "a loss or gradient that is no number ends the run; trace: and its microbatch is named, which reads each "
        "gradient once more; skip: and the update is left out, on all ranks, which wait for the figures of each step",
    )
    check_finite: bool = setting(
        False,
        "look at what every forward and backward puts out: a NaN ends the run and names stage, microbatch and action; "
        "slow, to find a fault",
        carried=False,
    )
    check_replicas: int = setting(
        0,
        "compare replicas of weights and moments by checksum every so many steps; 0: never",
        unit="steps",
        at_least=0,
        carried=False,
    )
    start_timeout: float = setting(120.0, "all ranks must have arrived within this time", unit="seconds", above=0)
    threads: int | None = setting(
        None,
        "threads of one CPU operation; unset: OMP_NUM_THREADS, or the node's cores shared by its ranks",
        at_least=1,
        carried=False,
    )
    tf32: bool = setting(
        False, "multiply fp32 matrices with factors rounded to TF32, 10 bits of mantissa: faster on GPUs from Ampere on"
    )
    deterministic: bool = setting(False, "allow only kernels that give the same bits each time")
    log_level: Literal["debug", "info", "warning"] = setting(
        "warning", "least severity that rank 0 writes to standard error; other ranks write warnings", carried=False
    )
    log_style: Literal["text", "json"] = setting(
        "text", "standard error for people, or as one JSON object per message", carried=False
    )
    log_dir: str | None = setting(
        None, "directory where every rank writes all its messages, to rank-<number>.jsonl", carried=False, path=True
    )
    tensorboard: bool | None = setting(None, "write TensorBoard files, too; unset: where that package is installed")
    wandb: str | None = setting(None, "a project of Weights & Biases that gets the same numbers", carried=False)
    mlflow: str | None = setting(None, "an experiment of MLflow that gets the same numbers", carried=False)
    profile: str | None = setting(
        None,
        "record some steps with PyTorch's profiler and write trace and memory history, as in steps=10:13 (steps 10, 11 "
        "and 12) or steps=10:13,ranks=0:8 (default rank 0)",
        carried=False,
    )
    peak_tflops: float | None = setting(
        None,
        "what one device computes at most, of which MFU is a share; unset: the dense bf16 rate of known GPUs, in bf16",
        unit="TFLOP/s",
        above=0,
        carried=False,
    )
