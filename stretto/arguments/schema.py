"""What the user can say: one frozen dataclass tree, the only place where a setting is declared.

Command line, files, presets, help, reference page and JSON schema are all read from it. A value of None is derived
from others (`derive.py` has the equations), or not used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal

from stretto.arguments.checkpoints import CheckpointConfig as CheckpointConfig
from stretto.arguments.data import DataConfig as DataConfig
from stretto.arguments.groups import AxisName as AxisName
from stretto.arguments.groups import GroupsConfig, NcclConfig
from stretto.arguments.model import ModelConfig as ModelConfig
from stretto.arguments.run import RunConfig as RunConfig
from stretto.arguments.setting import setting
from stretto.arguments.tuning import TuningConfig as TuningConfig
from stretto.layout import DEFAULT_ORDER

ScheduleName = Literal["1f1b", "auto", "depth-first", "dualpipev", "gpipe", "interleaved", "interleaved-zb", "looped-bfs", "v-half", "v-min", "zb-h1", "zb-h2", "zbv"]  # fmt: skip  # noqa: E501
CommName = Literal["all-gather", "ring", "ulysses", "hybrid", "auto"]

TOKENIZERS: Final = MappingProxyType({"byte": 257, "python": 4096})
"""The tokenizers of the library, and their vocabularies: 256 bytes and an end of document; BPE over Python sources."""


@dataclass(frozen=True)
class ParallelConfig:
    """How many ranks each axis has, and how the pipeline runs."""

    tp: int = setting(1, "tensor parallel: each matrix is cut over so many ranks", unit="ranks", at_least=1)
    cp: int = setting(1, "context parallel: each sequence is cut over so many ranks", unit="ranks", at_least=1)
    cp_comm: tuple[CommName, ...] = setting(
        ("auto",),
        "how ranks of cp get at keys and values, of all layers or of each: all-gather; ring: from rank to rank behind "
        "attention; ulysses: an all-to-all over heads; hybrid: ulysses among cp_a2a neighbours, a ring between these; "
        "auto: what a cost model finds quickest",
        carried=False,
        repeats=True,
    )
    cp_a2a: int | None = setting(
        None, "with hybrid, so many neighbours along cp exchange heads", unit="ranks", at_least=2, carried=False
    )
    pp: int = setting(1, "pipeline parallel: the layers are cut into so many stages", unit="ranks", at_least=1)
    ep: int = setting(1, "expert parallel: experts are spread over so many ranks", unit="ranks", at_least=1)
    etp: int = setting(1, "tensor parallel inside an expert", unit="ranks", at_least=1)
    dp: int | None = setting(
        None, "data parallel: replicas that each take a share of the batch", unit="ranks", at_least=1
    )
    order: str = setting(DEFAULT_ORDER, "axes along which ranks are counted, neighbours first")
    gpus_per_node: int | None = setting(
        None, "ranks of one node; what reaches across nodes is slow, and is warned of", at_least=1, carried=False
    )
    sequence_parallel: bool = setting(False, "between blocks, cut activations along the sequence over the tp ranks")
    tp_comm_overlap: bool | None = setting(
        None,
        "gathers and scatters of sequence parallelism pass behind GEMMs, carried by the copy engines of GPUs "
        "that reach each other; unset: on GPUs",
        carried=False,
    )
    schedule: ScheduleName = setting("1f1b", "order of forwards and backwards: `stretto schedule list` has all")  # noqa: RUF009
    schedule_costs: str | None = setting(
        None,
        "schedule = auto: a file of the times of each stage; where it is not there, a few steps are measured for it",
        carried=False,
        path=True,
    )
    vpp: int | None = setting(None, "virtual stages: so many on each rank; unset: what the schedule has", at_least=1)
    stage_layers: tuple[int, ...] | None = setting(
        None, "layers of each of the pp * vpp stages, or a layout such as Et*3|(tt|)*2t|L; unset: balanced", at_least=0
    )
    dp_copy_engines: bool = setting(
        True,
        "what is sharded is gathered and summed by the copy engines of GPUs that reach each other, behind GEMMs",
        carried=False,
    )
    sharding: Literal["none", "zero1", "zero2", "fsdp"] = setting(
        "none",
        "what each data-parallel rank holds a part of: none: nothing; zero1: optimizer state; zero2: gradients too; "
        "fsdp: weights too, which are gathered block by block",
        carried=False,
    )
    dp_shard: int | None = setting(
        None, "data-parallel ranks that share one copy of what is sharded; unset: all", at_least=1, carried=False
    )
    keep_units: int = setting(
        0, "fsdp: so many last blocks of a stage stay whole from forward to backward", at_least=0, carried=False
    )
    reduce_dtype: Literal["fp32", "bf16"] = setting(
        "fp32",
        "dtype in which gradients travel between data-parallel ranks; they are added in fp32, or wider",
        carried=False,
    )
    bucket_mb: float = setting(25.0, "gradients are reduced in buckets of about this size", unit="MB", above=0)


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
    clip_grad: float = setting(1.0, "gradients are scaled down to this global norm; 0: never", at_least=0)
    post_validate: bool = setting(
        False,
        "update before the norm of all gradients is known, and take the update back, bit for bit, where it was above "
        "clip_grad: no rank of a pipeline waits for it; costs a copy of gradients and optimizer state",
        carried=False,
    )


@dataclass(frozen=True)
class Arguments:
    """A whole run, as said by the user."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    groups: GroupsConfig = field(default_factory=GroupsConfig)
    nccl: NcclConfig = field(default_factory=NcclConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)
