"""The transformer of `stretto train`, from its arguments to an `Assembly` on this rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from stretto.arguments import ConfigError, Violation
from stretto.arguments.schema import Arguments, OptimizerConfig
from stretto.attention import Attend, attention_by
from stretto.attention.tile import tile_kernel
from stretto.context_parallel import ContextAttention, merge_
from stretto.distributed import AdamWRule, DataParallel, LionRule, MainGradients, MuonRule, Rule, SGDRule
from stretto.estimate import stage_blocks, stage_costs
from stretto.estimate.context import comm_of
from stretto.estimate.kept import Parts
from stretto.estimate.recompute import policies_of, policy_of_further
from stretto.experts import Balance, expert_axes, routers_of
from stretto.experts.fp8 import GroupedFp8
from stretto.interop.shapes import logical_shapes
from stretto.kernels import fused, hand_written
from stretto.models import StageSpec, Transformer
from stretto.notation.param_groups import parse_groups, unmatched
from stretto.parallel_state import ParallelState
from stretto.pipeline_parallel import CudaGraphs, TensorMeta
from stretto.schedule import schedule_for
from stretto.schedule.search import split
from stretto.schedule.sharding import MODES
from stretto.sequence import local_length
from stretto.structure import SequenceCut
from stretto.tensor_parallel import Build, LossTerms, unfused
from stretto.tensor_parallel.exact import SlicedAttention, Slices
from stretto.tensor_parallel.fp8 import RECIPES, Fp8, Tensorwise
from stretto.tensor_parallel.fp8_shards import WeightQuantizer
from stretto.tensor_parallel.lora import lora_of
from stretto.train.assemble import Assembly, assemble
from stretto.train.balanced import Balanced
from stretto.train.costs_file import read_costs, write_costs
from stretto.train.dtypes import DTYPES
from stretto.train.optimizers import flat
from stretto.train.step import Optimizer
from stretto.train.tuning import freeze, require_trained
from stretto.world import Axis


@dataclass(frozen=True)
class Built(Assembly[Transformer]):
    """The transformer that arguments describe, ready to train; what computes in fp8, where it is used."""

    fp8: tuple[Fp8, ...] = ()


def build(args: Arguments, state: ParallelState, *, draw: bool = True) -> Built:
    """Build this rank's part of the run, with initial weights drawn from `run.seed`, or zeros that are filled later."""
    policies = require_buildable(args)
    microbatches = args.batch.microbatches(state.layout.size("dp"))
    parts = stage_specs(args)
    p, tp = args.parallel, state.axis("tp")
    direct, fuse = MainGradients(), fused if args.run.compile else unfused
    passes = partial(fused, dynamic=True) if args.run.compile else unfused
    fp8 = None if args.run.fp8 == "none" else RECIPES[args.run.fp8](tp, passes)
    experts = expert_axes(state)
    grouped = (
        GroupedFp8(experts.etp, args.model.experts // experts.ep.size, passes) if fp8 and args.model.experts else None
    )
    in_fp8 = tuple(each for each in (fp8, grouped) if each)
    place = Build(
        tp,
        args.parallel.sequence_parallel,
        DTYPES[args.run.dtype],
        state.world.device,
        args.run.seed,
        fuse=fuse,
        accumulators=direct,
        gemms=fp8,
        allocate=False,
        lora=lora_of(args.tuning),
        chunks=args.run.ffn_chunks,
        cp=state.axis("cp"),
        experts=experts,
        experts_fp8=grouped,
        tokens=args.batch.global_batch * args.batch.seq_len,
        exact=None if p.exact is None else Slices(p.exact, tp, p.sequence_parallel),
    )
    seq_len = args.batch.seq_len
    offload = args.run.recompute == "offload"
    attend = attention_of(args, state, place.exact)
    made_here: dict[int, Transformer] = {}

    def make(s: int) -> Transformer:
        # A shared embedding whose two ends meet on this rank is one parameter.
        first = made_here[0].model.embed_tokens if 0 in made_here else None
        made_here[s] = Transformer(
            args.model,
            parts[s],
            place,
            seq_len=seq_len,
            recompute=dict(zip(parts[s].layers, policies[s], strict=True)) | policy_of_further(args),
            offload=offload,
            halves=p.ep_comm_overlap,
            attend=attend,
            embedding=None if first is None else first.weight,
            terms=LossTerms(args.loss.label_smoothing, args.loss.z_loss),
        )
        others = {p for n, module in made_here.items() if n != s for p in module.parameters()}
        freeze(made_here[s], args.tuning, elsewhere=others)
        return made_here[s]

    config, auto = args.optimizer, args.parallel.schedule == "auto"
    sizes = p.schedule, p.pp, microbatches, p.stages_per_rank
    order = partial(schedule_for, *sizes, shape=p.shape, memory=p.schedule_memory)
    known = read_costs(args, state) if auto else None
    begins = order(cost=known or stage_costs(args))
    update = flat(
        update_rule(config),
        groups=parse_groups(config.param_groups),
        moments=DTYPES[config.moments] if config.moments == "bf16" else None,
        remainder=config.masters == "remainder",
        cpu_offload=config.optimizer_cpu_offload,
        fuse=partial(fused, dynamic=True) if args.run.compile else unfused,
    )
    balance: list[Balance] = []

    def optimizer(weights: DataParallel) -> Optimizer:
        if not args.model.experts:
            return update(weights)
        balance.append(Balance(routers_of(made_here.values()), args.model, state, place.tokens))
        return Balanced(update(weights), balance[0])

    made = assemble(
        state,
        make,
        optimizer=optimizer,
        schedule=begins if known or not auto else split(begins),
        search=(lambda cost: order(cost=cost)) if auto and not known else None,
        keep_cost=partial(write_costs, args),
        post_validate=config.post_validate,
        boundary=_boundary(args, place),
        seed=args.run.seed,
        clip_grad=config.clip_grad,
        bucket_mb=args.parallel.bucket_mb,
        direct=direct,
        sharding=MODES[args.parallel.mode],
        keep_units=args.parallel.keep_units,
        draw=draw,
        steady=partial(_steady, in_fp8),
        on_nonfinite=args.run.on_nonfinite,
        wire=DTYPES["bf16"] if args.parallel.reduce_dtype == "bf16" else None,
        quantizer=WeightQuantizer(fp8, passes) if isinstance(fp8, Tensorwise) else None,
        recorder=CudaGraphs(state.world.device) if args.run.cuda_graphs else None,
    )
    made.stepper.further = torch.zeros((2, args.model.mtp_layers), dtype=torch.float64, device=state.world.device)
    if (last := made.stages.get(len(parts) - 1)) is not None:
        made.stepper.further = last.further_losses
    made.stepper.executor.check_finite = args.run.check_finite
    balanced = balance[0] if balance else None
    return Built(made.stages, made.stepper, made.evaluator, made.busy, made.tuner, balanced, in_fp8)


@contextmanager
def _steady(of: Sequence[Fp8]) -> Iterator[None]:
    """Weights do not change in here: see `Fp8.steady`."""
    with ExitStack() as stack:
        for each in of:
            stack.enter_context(each.steady())
        yield


def attention_of(args: Arguments, state: ParallelState, exact: Slices | None = None) -> Callable[[int], Attend]:
    """Attention of each layer, by its number: of plain rows on one rank, or of rows on the ranks of cp."""
    plain, kernel = (
        attention_by(args.run.attention, deterministic=args.deterministic),
        tile_kernel(state.world.device),
    )
    alone, cp = Axis.single("cp", state.world.rank), state.axis("cp")
    # What it has no kernel for is as quick as it was written down: its sizes are those of documents.
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
            way: Literal["all-gather", "ring"] = "ring" if comm in ("ring", "hybrid") else "all-gather"
            attend = ContextAttention(plain, kernel, inner, outer, way, merge)
            made[comm] = attend if exact is None else SlicedAttention(attend, exact, kv_heads=heads)
        return made[comm]

    return of_layer


def sequence_cut(args: Arguments, state: ParallelState) -> SequenceCut:
    """How rows are dealt to the ranks of cp."""
    cp, p = state.axis("cp"), args.parallel
    windows = tuple(args.model.window_of(layer) for layer in range(args.model.layers))
    return SequenceCut(cp.rank, cp.size, p.tp if p.sequence_parallel else 1, windows, args.model.mtp_layers)


def require_buildable(args: Arguments) -> list[tuple[Parts, ...]]:
    """What each layer of each stage computes once more. Raises ConfigError, on all ranks alike, where names of
    parameters fit none, or a budget of activations is too small for some stage."""
    require_groups_hold(args)
    require_trained(args)
    return policies_of(args)


def require_groups_hold(args: Arguments) -> None:
    """Raise ConfigError for a parameter group without parameters."""
    groups = parse_groups(args.optimizer.param_groups)
    names = list(logical_shapes(args.model, args.batch.seq_len)) if groups else []
    if none := unmatched(groups, names):
        problem = f"param_groups: no parameter has a name like {', '.join(none)}"
        hint = f"names are such as {', '.join(names[:2])}"
        raise ConfigError([Violation("groups_hold_parameters", ("optimizer.param_groups",), problem, hint=hint)])


def update_rule(config: OptimizerConfig) -> Rule | MuonRule:
    """The update rule of the settings."""
    betas, decay = (config.beta1, config.beta2), config.weight_decay
    if config.optimizer == "sgd":
        return SGDRule(config.momentum, decay)
    if config.optimizer == "lion":
        return LionRule(betas, decay)
    adamw = AdamWRule(betas, config.eps, decay)
    return MuonRule(adamw, config.momentum) if config.optimizer == "muon" else adamw


def stage_specs(args: Arguments) -> list[StageSpec]:
    """What of the model each stage holds."""
    stages = stage_blocks(args)
    return [StageSpec(held, first=s == 0, last=s == len(stages) - 1) for s, held in enumerate(stages)]


def _boundary(args: Arguments, place: Build) -> TensorMeta:
    """What crosses between stages: activations [s(/t), b, h] of this rank's slots."""
    parts = place.tp.size if place.sequence_parallel else 1
    cut = args.parallel.cp > 1
    seq = (local_length(args.batch.seq_len, args.parallel.cp, parts) if cut else args.batch.seq_len) // parts
    return TensorMeta((seq, args.batch.micro_batch, args.model.hidden), place.dtype)
