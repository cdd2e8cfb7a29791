"""From a way to build stages to all that a step runs on: buckets, optimizer, executor."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from stretto.collectives import all_reduce
from stretto.distributed import DataParallel, MainGradients
from stretto.distributed.quantized import Quantizer
from stretto.distributed.replicate import align
from stretto.experts import Balance
from stretto.parallel_state import ParallelState
from stretto.pipeline_parallel import Executor, GraphedExecutor, Link, Recorder, TensorMeta
from stretto.schedule import DDP, Cost, Schedule, Sharding, check_lowered, lower, partition
from stretto.schedule.generators import forward_only
from stretto.tensor_parallel import Build
from stretto.train.busy import BusyTime, TimedStage
from stretto.train.measured import Tuner, visits
from stretto.train.post_validate import PostValidated
from stretto.train.step import OnNonfinite, Optimizer, Stepper

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class StageSpec:
    """Which stage of the pipeline to build, and what its parallel layers are built with."""

    index: int
    count: int
    build: Build

    @property
    def first(self) -> bool:
        """Whether it takes what the data gives."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether its output goes to the loss."""
        return self.index == self.count - 1

    def layers(self, number: int, *, head: float = 0.0) -> range:
        """Global numbers of this stage's layers, of `number` in all; the last stage has work of `head` layers more."""
        return partition(number, self.count, head=head)[self.index]


@dataclass(frozen=True)
class Assembly(Generic[M]):
    """A model on this rank, ready to train: modules by stage, what makes a step, an executor of forwards alone."""

    stages: dict[int, M]
    stepper: Stepper
    evaluator: Executor
    busy: BusyTime
    tuner: Tuner | None = None
    """Told of each step before it is launched."""
    balance: Balance | None = None
    """Of the experts, where the model has any."""

    @property
    def weights(self) -> DataParallel:
        """Buckets of parameters and gradients."""
        return self.stepper.weights

    @property
    def optimizer(self) -> Optimizer:
        """Masters and the optimizer's state."""
        return self.stepper.optimizer


def assemble(
    state: ParallelState,
    make: Callable[[int], M],
    *,
    optimizer: Callable[[DataParallel], Optimizer],
    schedule: Schedule,
    boundary: TensorMeta | None,
    seed: int,
    clip_grad: float,
    bucket_mb: float,
    direct: MainGradients,
    sharding: Sharding = DDP,
    keep_units: int = 0,
    draw: bool = True,
    call: Callable[[int, M], Callable[..., Any]] = lambda _, module: module,
    steady: Callable[[], AbstractContextManager[object]] = nullcontext,
    on_nonfinite: OnNonfinite = "stop",
    wire: torch.dtype | None = None,
    quantizer: Quantizer | None = None,
    search: Callable[[Cost], Schedule] | None = None,
    keep_cost: Callable[[Cost], object] = bool,
    post_validate: bool = False,
    recorder: Recorder | None = None,
) -> Assembly[M]:
    """Build this rank's stages, and what trains them; initial weights follow from `seed`.

    Args:
        make: the module of a stage, by its number.
        schedule: the order of forwards and backwards; it places stages as the layout does.
        boundary: what crosses between stages; None where there is one stage.
        direct: the accumulators that the modules' layers are built with.
        sharding: what each data-parallel rank keeps a part of.
        keep_units: so many last units stay whole from forward to backward, where weights are sharded.
        draw: whether initial values are drawn; else parameters are zero, to be filled.
        call: what the executor calls in place of a stage's module.
        steady: a context in which the weights do not change, for each step.
        wire: the dtype in which gradients travel; None: that in which they are added.
        quantizer: how sharded weights are gathered that it takes.
        on_nonfinite: what follows a loss or gradient that is no number.
        search: the schedule for costs, which a few steps measure; None: `schedule` stays.
        keep_cost: told of these costs, on rank 0.
        post_validate: update before the norm of all gradients is known.
        recorder: makes graphs of microbatches, where there is one stage and neither weights nor gradients are sharded.
    """
    axis = state.axis("pp")
    sharding = sharding if state.axis("dp", "cp").size > 1 else DDP
    layout = state.layout
    if schedule.placement != layout.placement:
        raise ValueError(f"the schedule places stages {schedule.placement}, {layout} {layout.placement}")
    program = lower(schedule, sharding)
    check_lowered(program, sharding)
    modules = {s: make(s) for s, rank in enumerate(program.placement) if rank == axis.rank}
    known: set[nn.Parameter] = set()
    for module in modules.values():
        align(module, state, elsewhere=known)
        known |= set(module.parameters())
    busy = BusyTime(state.world.device)
    stages = {
        s: TimedStage(busy, s, call(s, module), boundary if s else None, direct.deferred)
        for s, module in modules.items()
    }
    weights = DataParallel(
        modules,
        state,
        bucket_mb=bucket_mb,
        direct=direct,
        sharding=sharding,
        keep=keep_units,
        visits=visits(program, axis.rank),
        wire=wire,
        quantizer=quantizer,
    )
    made = optimizer(weights)
    if draw:
        made.initialize(seed)
    ring = layout.vpp > 1 and layout.shape == "loop"
    link = Link.between(axis, state.world.device, state.axis, ring=ring)
    graphed = recorder if axis.size == 1 == program.num_stages and not (sharding.grads or sharding.params) else None
    if graphed is not None:
        state.before_close(graphed.clear)
    stepper = (PostValidated if post_validate else Stepper)(
        Executor(program, axis.rank, stages, link, weights)
        if graphed is None
        else GraphedExecutor(program, axis.rank, stages, link, weights, graphed, partial(all_say, state)),
        weights,
        made,
        clip_grad=clip_grad,
        steady=steady,
        on_nonfinite=on_nonfinite,
    )
    forwards = lower(forward_only(axis.size, schedule.num_microbatches, layout.placement), sharding)
    evaluator = Executor(forwards, axis.rank, stages, link, weights)
    tuner = Tuner(stepper, sharding, search, keep_cost) if search is not None and axis.size > 1 else None
    return Assembly(modules, stepper, evaluator, busy, tuner)


def all_say(state: ParallelState, yes: bool) -> bool:
    """Whether all ranks that compute a microbatch together say so; the host waits for them."""
    against = torch.tensor(0.0 if yes else 1.0, device=state.world.device)
    return not all_reduce(against, state.axis("tp")).item()
