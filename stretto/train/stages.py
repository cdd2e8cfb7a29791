"""The transformer's stages on this rank, from the arguments of `stretto train`: what each holds and computes with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from stretto.arguments.schema import Arguments
from stretto.attention import Attend, attention_by
from stretto.attention.tile import tile_kernel
from stretto.batch import Batch
from stretto.context_parallel import ContextAttention, Way, merge_
from stretto.distributed import MainGradients
from stretto.estimate import stage_blocks
from stretto.estimate.context import comm_of
from stretto.estimate.kept import Parts
from stretto.estimate.recompute import policy_of_further
from stretto.experts import expert_axes
from stretto.experts.fp8 import GroupedFp8
from stretto.kernels import fused, hand_written
from stretto.models import StageSpec, Transformer
from stretto.parallel_state import ParallelState
from stretto.pipeline_parallel import TensorMeta
from stretto.sequence import local_length
from stretto.structure import SequenceCut, Structure
from stretto.tensor_parallel import Build, LossTerms, unfused
from stretto.tensor_parallel.exact import SlicedAttention, Slices
from stretto.tensor_parallel.fp8 import RECIPES, Fp8, Tensorwise
from stretto.tensor_parallel.fp8_shards import WeightQuantizer
from stretto.tensor_parallel.lora import lora_of
from stretto.train.dtypes import DTYPES
from stretto.train.tuning import freeze
from stretto.world import Axis


class Stages:
    """Makes the transformer of each stage of this rank; `made` has those that it has made.

    Args:
        recomputed: what each layer of each stage computes again in the backward.
    """

    def __init__(self, args: Arguments, state: ParallelState, recomputed: Sequence[tuple[Parts, ...]]) -> None:
        self.args, self.recomputed = args, recomputed
        self.specs = stage_specs(args)
        self.made: dict[int, Transformer] = {}
        p, run, tp, experts = args.parallel, args.run, state.axis("tp"), expert_axes(state)
        self.passes = partial(fused, dynamic=True) if run.compile else unfused
        """Makes one kernel of passes over tensors of many sizes."""
        self.dense_fp8 = None if run.fp8 == "none" else RECIPES[run.fp8](tp, self.passes)
        grouped = None
        if self.dense_fp8 and args.model.experts:
            grouped = GroupedFp8(experts.etp, args.model.experts // experts.ep.size, self.passes)
        self.fp8: tuple[Fp8, ...] = tuple(each for each in (self.dense_fp8, grouped) if each)
        self.gradients = MainGradients()
        self.build = Build(
            tp,
            p.sequence_parallel,
            DTYPES[run.dtype],
            state.world.device,
            run.seed,
            fuse=fused if run.compile else unfused,
            accumulators=self.gradients,
            gemms=self.dense_fp8,
            allocate=False,
            lora=lora_of(args.tuning),
            chunks=run.ffn_chunks,
            cp=state.axis("cp"),
            experts=experts,
            experts_fp8=grouped,
            tokens=args.batch.global_batch * args.batch.seq_len,
            exact=None if p.exact is None else Slices(p.exact, tp, p.sequence_parallel),
        )
        self.attend = attention_of(args, state, self.build.exact)

    def __call__(self, stage: int) -> Transformer:
        """The stage of this number, without memory, its parameters declared; what is frozen wants no gradient."""
        args, spec = self.args, self.specs[stage]
        # A shared embedding whose two ends meet on this rank is one parameter.
        first = self.made[0].model.embed_tokens if 0 in self.made else None
        elsewhere = {parameter for module in self.made.values() for parameter in module.parameters()}
        made = self.made[stage] = Transformer(
            args.model,
            spec,
            self.build,
            seq_len=args.batch.seq_len,
            recompute=dict(zip(spec.layers, self.recomputed[stage], strict=True)) | policy_of_further(args),
            offload=args.run.recompute == "offload",
            halves=args.parallel.ep_comm_overlap,
            attend=self.attend,
            embedding=None if first is None else first.weight,
            terms=LossTerms(args.loss.label_smoothing, args.loss.z_loss),
        )
        freeze(made, args.tuning, elsewhere=elsewhere)
        return made

    @property
    def boundary(self) -> TensorMeta:
        """What crosses between stages: activations [s(/t), b, h] of this rank's slots."""
        batch, cp, build = self.args.batch, self.args.parallel.cp, self.build
        parts = build.tp.size if build.sequence_parallel else 1
        seq = (local_length(batch.seq_len, cp, parts) if cp > 1 else batch.seq_len) // parts
        return TensorMeta((seq, batch.micro_batch, self.args.model.hidden), build.dtype)

    @property
    def quantizer(self) -> WeightQuantizer | None:
        """How sharded weights are gathered in FP8, where each has one scale."""
        return WeightQuantizer(self.dense_fp8, self.passes) if isinstance(self.dense_fp8, Tensorwise) else None

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Weights do not change in here: see `Fp8.steady`."""
        with ExitStack() as stack:
            for each in self.fp8:
                stack.enter_context(each.steady())
            yield


def attention_of(args: Arguments, state: ParallelState, exact: Slices | None = None) -> Callable[[int], Attend]:
    """Attention of each layer, by its number: of plain rows on one rank, or of rows on the ranks of cp."""
    plain, kernel = (
        attention_by(args.run.attention, deterministic=args.deterministic),
        tile_kernel(state.world.device),
    )
    alone, cp = Axis.single("cp", state.world.rank), state.axis("cp")
    # Its sizes are those of documents: the compiler would make a kernel for each.
    triton = args.run.compile and state.world.device.type == "cuda"
    merge = hand_written(merge_, merge_) if triton else unfused(merge_)
    made: dict[str, Attend] = {}
    heads = args.model.num_kv_heads

    def of_layer(layer: int) -> Attend:
        comm = comm_of(args, layer) if cp.size > 1 else "all-gather"
        if comm not in made:
            if comm == "hybrid":
                inner, outer = state.axis("cp.0"), state.axis("cp.1")
            else:
                inner, outer = (cp, alone) if comm == "ulysses" else (alone, cp)
            way: Way = "needed" if comm == "needed" else "ring" if comm in ("ring", "hybrid") else "all-gather"
            attend = ContextAttention(plain, kernel, inner, outer, way, merge)
            made[comm] = attend if exact is None else SlicedAttention(attend, exact, kv_heads=heads)
        return made[comm]

    return of_layer


def sequence_cut(args: Arguments, state: ParallelState) -> SequenceCut:
    """How rows are dealt to the ranks of cp."""
    return _sequence_cut(args, state.axis("cp").rank)


def structure_of_rows(args: Arguments) -> Structure:
    """How rows of one document lie on the ranks of cp, as the first of them sees it."""
    row = torch.zeros(1, args.batch.seq_len, dtype=torch.int64)
    return _sequence_cut(args, 0).of(Batch(row, row, row.bool()))[1]


def _sequence_cut(args: Arguments, rank: int) -> SequenceCut:
    p = args.parallel
    windows = tuple(args.model.window_of(layer) for layer in range(args.model.layers))
    return SequenceCut(rank, p.cp, p.tp if p.sequence_parallel else 1, windows, args.model.mtp_layers)


def stage_specs(args: Arguments) -> list[StageSpec]:
    """What of the model each stage holds."""
    stages = stage_blocks(args)
    return [StageSpec(held, first=s == 0, last=s == len(stages) - 1) for s, held in enumerate(stages)]
