"""The transformer of `stretto train`, from its arguments to an `Assembly` on this rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from stretto.arguments import ConfigError, Violation
from stretto.arguments.schema import Arguments
from stretto.distributed import DataParallel
from stretto.estimate import stage_costs
from stretto.estimate.kept import Parts
from stretto.estimate.recompute import policies_of
from stretto.experts import Balance, routers_of
from stretto.interop.shapes import logical_shapes
from stretto.models import Transformer
from stretto.notation.param_groups import parse_groups, unmatched
from stretto.parallel_state import ParallelState
from stretto.pipeline_parallel import CudaGraphs
from stretto.schedule import Cost, Schedule, schedule_for
from stretto.schedule.search import split
from stretto.schedule.sharding import MODES
from stretto.tensor_parallel.fp8 import Fp8
from stretto.train.assemble import Assembly, assemble
from stretto.train.balanced import Balanced
from stretto.train.costs_file import read_costs, write_costs
from stretto.train.dtypes import DTYPES
from stretto.train.optimizers import optimizer_of
from stretto.train.stages import Stages
from stretto.train.step import Optimizer
from stretto.train.tuning import require_trained
from stretto.world import PeerBuffer


@dataclass(frozen=True)
class Built(Assembly[Transformer]):
    """The transformer that arguments describe, ready to train; what computes in fp8, where it is used."""

    fp8: tuple[Fp8, ...] = ()


def build(args: Arguments, state: ParallelState, *, draw: bool = True) -> Built:
    """Build this rank's part of the run, with initial weights drawn from `run.seed`, or zeros that are filled later."""
    stages = Stages(args, state, require_buildable(args))
    update = optimizer_of(args.optimizer, stages.passes)

    def optimizer(weights: DataParallel) -> Optimizer:
        if not args.model.experts:
            return update(weights)
        routers = routers_of(stages.made.values())
        return Balanced(update(weights), Balance(routers, args.model, state, stages.build.tokens))

    schedule, search = schedules(args, state)
    made = assemble(
        state,
        stages,
        optimizer=optimizer,
        schedule=schedule,
        search=search,
        keep_cost=partial(write_costs, args),
        post_validate=args.optimizer.post_validate,
        boundary=stages.boundary,
        seed=args.run.seed,
        clip_grad=args.optimizer.clip_grad,
        bucket_mb=args.parallel.bucket_mb,
        direct=stages.gradients,
        sharding=MODES[args.parallel.mode],
        keep_units=args.parallel.keep_units,
        draw=draw,
        steady=stages.steady,
        on_nonfinite=args.run.on_nonfinite,
        wire=DTYPES["bf16"] if args.parallel.reduce_dtype == "bf16" else None,
        quantizer=stages.quantizer,
        recorder=CudaGraphs(state.world.device, peer_buffers(state)) if args.run.cuda_graphs else None,
    )
    made.stepper.further = torch.zeros((2, args.model.mtp_layers), dtype=torch.float64, device=state.world.device)
    if (last := made.stages.get(len(stages.specs) - 1)) is not None:
        made.stepper.further = last.further_losses
    made.stepper.executor.check_finite = args.run.check_finite
    balance = made.optimizer.balance if isinstance(made.optimizer, Balanced) else None
    return Built(made.stages, made.stepper, made.evaluator, made.busy, made.tuner, balance, stages.fp8)


def peer_buffers(state: ParallelState) -> list[PeerBuffer]:
    """What messages within a microbatch go through, where there are any."""
    buffer = state.axis("tp").peer_buffer
    return [] if buffer is None else [buffer]


def schedules(args: Arguments, state: ParallelState) -> tuple[Schedule, Callable[[Cost], Schedule] | None]:
    """The schedule that a run begins with; and how measured costs give another, where `auto` has none from a file."""
    p, microbatches = args.parallel, args.batch.microbatches(state.layout.size("dp"))

    def order(cost: Cost) -> Schedule:
        return schedule_for(p.schedule, p.pp, microbatches, p.stages_per_rank, cost, p.shape, p.schedule_memory)

    if p.schedule != "auto":
        return order(stage_costs(args)), None
    known = read_costs(args, state)
    return (split(order(stage_costs(args))), order) if known is None else (order(known), None)


def require_buildable(args: Arguments) -> list[tuple[Parts, ...]]:
    """What each layer of each stage recomputes. Raises ConfigError, on all ranks alike, where names of
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
