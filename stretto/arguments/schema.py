"""What the user can say: one frozen dataclass tree, the only place where a setting is declared.

Command line, files, presets, help, reference page and JSON schema are all read from it. A value of None is derived
from others (`derive.py` has the equations), or not used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from stretto.arguments.model import ModelConfig as ModelConfig
from stretto.arguments.recomputation import Recomputation
from stretto.arguments.sections import AxisName as AxisName
from stretto.arguments.sections import BatchConfig as BatchConfig
from stretto.arguments.sections import CheckpointConfig as CheckpointConfig
from stretto.arguments.sections import DataConfig as DataConfig
from stretto.arguments.sections import GroupsConfig, NcclConfig
from stretto.arguments.sections import LossConfig as LossConfig
from stretto.arguments.sections import OptimizerConfig as OptimizerConfig
from stretto.arguments.sections import TuningConfig as TuningConfig
from stretto.arguments.setting import local_setting, setting
from stretto.layout import DEFAULT_ORDER, Layout, Shape
from stretto.layout.schedules import FAMILIES

ScheduleName = Literal["1f1b", "auto", "depth-first", "dualpipev", "gpipe", "interleaved", "interleaved-zb", "looped-bfs", "v-half", "v-min", "zb-h1", "zb-h2", "zbv"]  # fmt: skip  # noqa: E501
CommName = Literal["all-gather", "needed", "ring", "ulysses", "hybrid", "auto"]


@dataclass(frozen=True)
class ParallelConfig:
    """How many ranks each axis has, and how the pipeline runs."""

    tp: int = setting(1, "tensor parallel: each matrix is cut over so many ranks", unit="ranks", at_least=1)
    cp: int = setting(1, "context parallel: each sequence is cut over so many ranks", unit="ranks", at_least=1)
    cp_comm: tuple[CommName, ...] = local_setting(
        ("auto",),
        "how ranks of cp get at keys and values, of all layers or of each: all-gather; needed: only those that queries "
        "of a rank see, of their documents and windows; ring: from rank to rank behind attention; ulysses: an "
        "all-to-all over heads; hybrid: ulysses among cp_a2a neighbours, a ring between these; auto: what a cost model "
        "finds quickest",
        repeats=True,
    )
    cp_a2a: int | None = local_setting(
        None, "with hybrid, so many neighbours along cp exchange heads", unit="ranks", at_least=2
    )
    pp: int = setting(1, "pipeline parallel: the layers are cut into so many stages", unit="ranks", at_least=1)
    ep: int = setting(1, "expert parallel: experts are spread over so many ranks", unit="ranks", at_least=1)
    etp: int = setting(1, "tensor parallel inside an expert", unit="ranks", at_least=1)
    ep_comm_overlap: bool = local_setting(
        False,
        "a microbatch goes through the blocks in two halves of its samples: while tokens of one are on their way to "
        "experts and back the other computes",
    )
    ep_copy_engines: bool = local_setting(
        False, "tokens go to experts and back by the copy engines of GPUs that reach each other, not by NCCL"
    )
    dp: int | None = setting(
        None, "data parallel: replicas that each take a share of the batch", unit="ranks", at_least=1
    )
    order: str = setting(DEFAULT_ORDER, "axes along which ranks are counted, neighbours first")
    gpus_per_node: int | None = local_setting(
        None, "ranks of one node; what reaches across nodes is slow, and is warned of", at_least=1
    )
    sequence_parallel: bool = setting(False, "between blocks, cut activations along the sequence over the tp ranks")
    tp_comm_overlap: bool | None = local_setting(
        None,
        "gathers and scatters of sequence parallelism pass behind GEMMs, carried by the copy engines of GPUs "
        "that reach each other; unset: on GPUs",
    )
    exact: int | None = setting(
        None,
        "compute all that tp may cut in so many slices, a power of two, whose sums stand in a fixed order: loss, "
        "gradients and weights are the same bits for every tp that divides it; slower, and without torch.compile",
        at_least=1,
    )
    schedule: ScheduleName = setting("1f1b", "order of forwards and backwards: `stretto schedule list` has all")  # noqa: RUF009
    schedule_costs: str | None = local_setting(
        None,
        "a file of the times of each stage, from which schedule = auto and partition = searched take theirs; where it "
        "is not there, they begin with an estimate, and with auto a few steps are measured for the file",
        path=True,
    )
    schedule_memory: float | None = local_setting(
        None,
        "schedule = auto: microbatches whose activations a rank may hold; unset: pp, as many as with 1f1b",
        at_least=1,
    )
    vpp: int | None = setting(
        None,
        "virtual stages: so many on each rank; unset: what the schedule has; with schedule = auto up to 4, searched",
        at_least=1,
    )
    vpp_shape: Literal["loop", "v"] | None = setting(
        None,
        "how several stages of a rank lie: from the first rank each time, or to and fro; unset: as the schedule has",
    )
    stage_layers: tuple[float, ...] | None = setting(
        None, "layers of each of the pp * vpp stages, also halves: 4.5,3.5 or Et*4a|ft*3L; unset: balanced", at_least=0
    )
    partition: Literal["balanced", "searched"] = setting(
        "balanced",
        "layers over stages, and halves where that gains 1 %: balanced: by multiplications; searched: as the step is "
        "shortest by the times of schedule_costs, or an estimate; stages may be empty",
    )
    pp_copy_engines: bool = local_setting(
        True, "messages between stages go by the copy engines of GPUs that reach each other, behind GEMMs"
    )
    dp_copy_engines: bool = local_setting(
        True, "what is sharded is gathered and summed by the copy engines of GPUs that reach each other, behind GEMMs"
    )
    sharding: Literal["none", "zero1", "zero2", "fsdp"] | None = local_setting(
        None,
        "what each data-parallel rank holds a part of: none: nothing; zero1: optimizer state; zero2: gradients too; "
        "fsdp: weights too, which are gathered block by block; unset: zero1 on GPUs",
    )
    dp_shard: int | None = local_setting(None, "data-parallel ranks that share one copy; unset: all", at_least=1)
    keep_units: int = local_setting(0, "fsdp: so many last blocks of a stage stay whole until backward", at_least=0)
    reduce_dtype: Literal["fp32", "bf16"] = local_setting(
        "fp32", "dtype in which gradients travel between data-parallel ranks; they are added in fp32, or wider"
    )
    bucket_mb: float = setting(25.0, "gradients are reduced in buckets of about this size", unit="MB", above=0)

    @property
    def mode(self) -> str:
        """Of sharding: `sharding`, or nothing."""
        return self.sharding or "none"

    @property
    def stages_per_rank(self) -> int:
        """Stages on each rank of the pipeline: `vpp`, or as many as the schedule has by itself."""
        return FAMILIES[self.schedule].stages if self.vpp is None else self.vpp

    @property
    def num_stages(self) -> int:
        """Stages of the whole pipeline."""
        return self.pp * self.stages_per_rank

    @property
    def shape(self) -> Shape:
        """How they lie on the ranks: `vpp_shape`, or as the schedule has it."""
        return self.vpp_shape or FAMILIES[self.schedule].shape_of(self.stages_per_rank)

    @property
    def layout(self) -> Layout:
        """The settings as geometry. Copies of what is sharded, and neighbours that exchange heads, are levels."""
        dp, cp = self.dp or 1, self.cp
        return Layout.of(
            tp=self.tp,
            cp=cp if self.cp_a2a is None else (self.cp_a2a, cp // self.cp_a2a),
            dp=dp if (shard := self.dp_shard or dp) >= dp else (shard, dp // shard),
            pp=self.pp,
            ep=self.ep,
            etp=self.etp,
            order=self.order,
            vpp=self.stages_per_rank,
            shape=self.shape,
        )


@dataclass(frozen=True)
class RunConfig(Recomputation):
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
        "row in forward and input gradient, as experts always have; weights, masters and all else stay what they are",
    )
    attention: Literal["torch", "flash4"] = setting(
        "torch",
        "whose kernels compute attention: torch's, the quickest first that takes the shapes, or those of the package "
        "flash-attn-4, which must be installed",
    )
    compile: bool | None = local_setting(
        None, "one kernel for each chain of elementwise operations, by torch.compile; unset: on GPUs"
    )
    cuda_graphs: bool | None = local_setting(
        None,
        "forward and backward of a microbatch are one CUDA graph, which the host launches at once, with the same "
        "kernels; unset: wherever they can be recorded",
    )
    ffn_chunks: int = local_setting(
        1,
        "feed-forward takes the sequence in so many chunks and recomputes each in the backward, so that its "
        "inner activations exist of one at a time; 1: as a whole",
        at_least=1,
        at_most=2**16,
    )
    progress: Literal["auto", "live", "lines", "none"] = local_setting(
        "auto",
        "live: two lines of a terminal, kept up to date; lines: one for each report; auto: live at a terminal that the "
        "command was started from, by no MPI launcher",
    )
    log_every: int = setting(1, "report a line every so many steps", unit="steps", at_least=1)
    eval_every: int = setting(
        0, "evaluate on held-out text every so many steps; 0: at the end only", unit="steps", at_least=0
    )
    eval_batches: int = setting(8, "global batches of one evaluation, of each validation set; 0: all of it", at_least=0)
    sample_tokens: int = setting(
        0, "continue a prompt by so many tokens when the run ends; 0: do not", unit="tokens", at_least=0, at_most=2**20
    )
    sample_prompt: str = setting("def ", "the prompt that is continued")
    timeout: float = setting(600.0, "a collective that takes longer ends the run", unit="seconds", above=0)
    exit_duration: float | None = local_setting(
        None,
        "after so long the run saves and ends with exit code 75, to be started again with --resume",
        unit="seconds",
        above=0,
    )
    check_collectives: bool = local_setting(
        False,
        "compare each communication on all its ranks before it begins: slow, and says which rank hangs the others",
    )
    on_nonfinite: Literal["stop", "trace", "skip"] = setting(
        "stop",
        "a loss or gradient that is no number ends the run; trace: and its microbatch is named, which reads each "
        "gradient once more; skip: and the update is left out, on all ranks, which wait for the figures of each step",
    )
    check_finite: bool = local_setting(
        False,
        "look at what every forward and backward puts out: a NaN ends the run and names stage, microbatch and action; "
        "slow, to find a fault",
    )
    check_replicas: int = local_setting(
        0, "compare replicas of weights and moments by checksum every so many steps; 0: never", unit="steps", at_least=0
    )
    start_timeout: float = setting(120.0, "all ranks must have arrived within this time", unit="seconds", above=0)
    threads: int | None = local_setting(
        None,
        "threads of one CPU operation; unset: OMP_NUM_THREADS, or the node's cores shared by its ranks",
        at_least=1,
    )
    tf32: bool = setting(
        False, "multiply fp32 matrices with factors rounded to TF32, 10 bits of mantissa: faster on GPUs from Ampere on"
    )
    deterministic: bool = setting(False, "allow only kernels that give the same bits each time")
    log_level: Literal["debug", "info", "warning"] = local_setting(
        "warning", "least severity that rank 0 writes to standard error; other ranks write warnings"
    )
    log_style: Literal["text", "json"] = local_setting(
        "text", "standard error for people, or as one JSON object per message"
    )
    log_dir: str | None = local_setting(
        None, "directory where every rank writes all its messages, to rank-<number>.jsonl", path=True
    )
    tensorboard: bool | None = setting(None, "write TensorBoard files, too; unset: where that package is installed")
    wandb: str | None = local_setting(None, "a project of Weights & Biases that gets the same numbers")
    mlflow: str | None = local_setting(None, "an experiment of MLflow that gets the same numbers")
    profile: str | None = local_setting(
        None,
        "record some steps with PyTorch's profiler and write trace and memory history, as in steps=10:13 (steps 10, 11 "
        "and 12) or steps=10:13,ranks=0:8 (default rank 0)",
    )
    peak_tflops: float | None = local_setting(
        None,
        "what one device computes at most, of which MFU is a share; unset: the dense bf16 rate of known GPUs, in bf16",
        unit="TFLOP/s",
        above=0,
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
    loss: LossConfig = field(default_factory=LossConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def deterministic(self) -> bool:
        """Whether each operation must give the same bits each time."""
        return self.run.deterministic or self.parallel.exact is not None

    @property
    def threads(self) -> int | None:
        """Those of one CPU operation: how many there are decides in what order it adds up."""
        return 1 if self.parallel.exact is not None and self.run.device == "cpu" else self.run.threads
