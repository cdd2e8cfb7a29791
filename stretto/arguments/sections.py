"""The small sections of the schema: process groups, batch, update, loss, fine-tuning, data and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Final, Literal

from stretto.arguments.setting import local_setting, setting

AxisName = Literal["tp", "dp", "pp", "cp", "dp-cp", "tp-pp", "pp-dp-cp", "embed", "tp-cp-dp-pp"]
"""Axes that have process groups, and combinations of axes that have groups of their own."""

TOKENIZERS: Final = MappingProxyType({"byte": 257, "python": 4096})
"""The tokenizers of the library, and their vocabularies: 256 bytes and an end of document; BPE over Python sources."""


@dataclass(frozen=True)
class GroupsConfig:
    """Process groups, by the axis that they lie along."""

    timeouts: tuple[tuple[AxisName, int], ...] = setting(
        (),
        "a collective of these groups that takes longer ends the run; of the others, --timeout",
        unit="seconds",
        at_least=1,
    )
    gloo: tuple[AxisName, ...] = setting((), "axes whose groups run over Gloo, through the host, and not over NCCL")


@dataclass(frozen=True)
class NcclConfig:
    """How NCCL runs the process groups of an axis."""

    high_priority: tuple[AxisName, ...] = setting((), "axes whose kernels run on a stream of high priority")
    min_ctas: tuple[tuple[AxisName, int], ...] = setting(
        (), "at least so many thread blocks for a kernel", at_least=1, at_most=64
    )
    max_ctas: tuple[tuple[AxisName, int], ...] = setting(
        (), "at most so many thread blocks for a kernel", at_least=1, at_most=64
    )


@dataclass(frozen=True)
class BatchConfig:
    """Sizes of a batch."""

    seq_len: int = setting(256, "length of a sequence", unit="tokens", at_least=1, at_most=2**26)
    micro_batch: int = setting(
        4, "sequences that one rank computes at a time", unit="sequences", at_least=1, at_most=2**22
    )
    global_batch: int = setting(
        32, "sequences of one optimizer step, over all ranks", unit="sequences", at_least=1, at_most=2**22
    )

    def microbatches(self, dp: int | None) -> int:
        """Microbatches of each rank in a step, over `dp` replicas of the model."""
        return self.global_batch // (self.micro_batch * (dp or 1))


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule, its learning-rate schedule and clipping."""

    optimizer: Literal["adamw", "sgd", "lion", "muon"] = setting(
        "adamw",
        "update rule; the decay of sgd is added to the gradient, that of the others is decoupled; muon is AdamW for "
        "embeddings, head, norms and biases",
    )
    lr: float = setting(1e-3, "peak learning rate", above=0)
    min_lr: float = setting(1e-4, "learning rate at the end of the decay", at_least=0)
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = setting(
        "cosine", "shape of the decay; wsd (warm-up, stable, decay) stays at the peak until the cooldown"
    )
    warmup_steps: int = setting(20, "the rate grows linearly up to lr over so many steps", unit="steps", at_least=0)
    decay_steps: int | None = setting(
        None, "step at which min_lr is reached, counted from step 0", unit="steps", at_least=1
    )
    cooldown_steps: int | None = setting(
        None, "wsd: length of the final decay, which ends at decay_steps", unit="steps", at_least=1
    )
    weight_decay: float = setting(0.1, "decoupled weight decay of matrices", at_least=0)
    param_groups: str = setting(
        "",
        "what is otherwise for parameters, by name: `*norm*|*.bias: weight_decay=0; *embed*: lr=0.5` (lr multiplies)",
    )
    beta1: float = setting(0.9, "decay of the first moment", at_least=0, below=1)
    beta2: float = setting(0.95, "decay of the second moment", at_least=0, below=1)
    eps: float = setting(1e-8, "added to the root of the second moment", above=0)
    momentum: float = setting(0.9, "sgd, muon: decay of the momentum", at_least=0, below=1)
    moments: Literal["fp32", "bf16"] = setting(
        "fp32", "dtype of the update rule's state; fp32: that of the masters, fp32 or wider"
    )
    masters: Literal["fp32", "remainder"] = setting(
        "fp32",
        "master weights of a run in bf16: a copy in fp32; or remainder: 16 bits that, with the weights themselves, are "
        "the same fp32 numbers (weights are rounded with ties away from zero)",
    )
    optimizer_cpu_offload: bool = local_setting(
        False,
        "masters and moments lie in the host's memory, and pass through the device a chunk at a time, beside the next "
        "forward: the same update to the last bit",
    )
    clip_grad: float = setting(1.0, "gradients are scaled down to this global norm; 0: never", at_least=0)
    post_validate: bool = local_setting(
        False,
        "update before the norm of all gradients is known, and take the update back, bit for bit, where it was above "
        "clip_grad: no rank of a pipeline waits for it; but for AdamW of bf16 weights costs a copy of optimizer state",
    )


@dataclass(frozen=True)
class LossConfig:
    """What is minimized in training; an evaluation is cross-entropy alone."""

    label_smoothing: float = setting(
        0.0,
        "this share of the probability of each label goes to all words of the vocabulary alike, in training; the loss "
        "of a step is that with it",
        at_least=0,
        below=1,
    )
    z_loss: float = setting(
        0.0,
        "so many times the square of each token's log of summed exponentials is added to the loss in training, which "
        "keeps logits from drifting (PaLM: 1e-4)",
        at_least=0,
    )


A, B = "lora_A", "lora_B"
TargetName = Literal["q", "k", "v", "o", "gate", "up", "down"]


@dataclass(frozen=True)
class TuningConfig:
    """What of a model is trained, where not all of it is."""

    freeze: tuple[str, ...] = setting(
        (), "parameters that stay as they are, by name: * stands for anything, as in model.embed_tokens.*"
    )
    lora_rank: int = setting(
        0,
        "train low-rank adapters of this rank alone, and no other parameter; 0: no adapters",
        at_least=0,
        at_most=2**14,
    )
    lora_alpha: float = setting(16.0, "what an adapter adds is multiplied by lora_alpha / lora_rank", above=0)
    lora_dropout: float = setting(0.0, "share of an adapter's input that falls away in training", at_least=0, below=1)
    lora_targets: tuple[TargetName, ...] = setting(
        ("q", "k", "v", "o"),
        "matrices with an adapter: of attention q, k, v and o, of the feed-forward gate, up and down",
    )

    def trains(self, name: str) -> bool:
        """Whether the parameter of that logical name has a gradient."""
        return is_adapter(name) if self.lora_rank else not any(fnmatchcase(name, pattern) for pattern in self.freeze)

    def adapts(self, matrix: str) -> bool:
        """Whether matrices of that name, such as q_proj, have an adapter."""
        return self.lora_rank > 0 and matrix.removesuffix("_proj") in self.lora_targets


def is_adapter(name: str) -> bool:
    """Whether a logical name is that of an adapter's matrix."""
    return name.endswith((f".{A}", f".{B}"))


@dataclass(frozen=True)
class DataConfig:
    """What text to train on, and how it becomes tokens."""

    data: str | None = setting(
        None,
        "text files, a .jsonl, the .bin of tokens; shares as in a/:0.7,b.jsonl:0.3; unset: Python's standard library",
        path=True,
    )
    text_key: str = setting("text", "the field of each JSON line that holds its text")
    format: Literal["text", "chat"] = setting(
        "text",
        "chat: JSON lines with messages, or with prompt and completion, of which the answers alone count in the loss",
    )
    tokenizer: str = setting("byte", "byte, or a tokenizer.json of the tokenizers library, or its directory", path=True)
    packing: bool = setting(
        False,
        "rows of whole documents, as many as fit, which do not see each other; else rows are windows of the text, in "
        "which attention crosses from one document to the next",
    )
    eval_data: str | None = setting(None, "more validation sets, each with its curve: name=path,other=path", path=True)
    held_out: float = setting(0.05, "share of the files kept for evaluation", at_least=0, below=1)
    max_lost: float = setting(0.01, "share of the text that the tokenizer may lose", at_least=0, at_most=1)
    cache: str = local_setting(
        "~/.cache/stretto", "directory for tokenized text; where XDG_CACHE_HOME is set, stretto there", path=True
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """Where checkpoints go, how often, and whether to go on from one."""

    out: str = local_setting("runs/latest", "directory of the run: checkpoints, metrics, resolved.toml", path=True)
    save_every: int = setting(0, "save a checkpoint every so many steps; 0: at the end only", unit="steps", at_least=0)
    save: bool = local_setting(
        True, "write checkpoints; without, the run leaves its metrics alone, and nothing goes on from it"
    )
    async_save: bool = local_setting(
        True, "a process of its own writes checkpoints while training goes on; else training waits"
    )
    keep: int = setting(2, "so many newest checkpoints stay", at_least=1)
    keep_every: int = setting(
        0, "besides them, each checkpoint whose step is a multiple of this stays; 0: none", unit="steps", at_least=0
    )
    checkpoint_dir: str | None = local_setting(
        None,
        "where checkpoints go, also a URL such as s3://bucket/run; unset: the directory checkpoints in that of the run",
        path=True,
    )
    init_from: str | None = setting(
        None,
        "directory of a Hugging Face model, or its name in the cache of downloads: the run begins with its shape, "
        "weights and tokenizer",
    )
    export_hf: str | None = local_setting(
        None, "directory that gets the model as a Hugging Face one when the run has made its last step", path=True
    )
    resume: bool = local_setting(False, "go on from the newest complete checkpoint in the directory of the run")
    auto_resume: bool = local_setting(False, "like resume, but begin anew where there is no checkpoint yet")
