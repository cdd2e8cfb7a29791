"""From arguments to the objects of a run: model, executor, optimizer, on this rank's place."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from stretto.arguments.pipeline import vpp_of
from stretto.arguments.schema import Arguments
from stretto.distributed import AdamW, DataParallel, MainGradients
from stretto.estimate import stage_costs, stage_layers
from stretto.kernels import hand_written
from stretto.models import StageSpec, Transformer, attention_by
from stretto.parallel_state import ParallelState
from stretto.pipeline_parallel import Executor, Link, Stage, TensorMeta
from stretto.schedule import DDP, lower, schedule_for
from stretto.schedule.generators import forward_only
from stretto.tensor_parallel import Build, unfused
from stretto.tensor_parallel.fp8 import RECIPES, Fp8
from stretto.train.dtypes import DTYPES
from stretto.train.step import Trainer


@dataclass(frozen=True)
class Built:
    """What `build` makes: modules by stage, the trainer over them, an executor of forwards alone; fp8 where used."""

    stages: dict[int, Transformer]
    trainer: Trainer
    evaluator: Executor
    fp8: Fp8 | None

    @property
    def weights(self) -> DataParallel:
        """Buckets of parameters and gradients."""
        return self.trainer.weights

    @property
    def optimizer(self) -> AdamW:
        """Masters and moments."""
        return self.trainer.optimizer


def build(args: Arguments, state: ParallelState) -> Built:
    """Build this rank's part of the run, with initial weights drawn from `run.seed`."""
    layout, axis = state.layout, state.axis("pp")
    parts = stage_specs(args)
    microbatches = args.batch.global_batch // (args.batch.micro_batch * layout.size("dp"))
    costs = stage_costs(args)
    schedule = schedule_for(args.parallel.schedule, axis.size, microbatches, vpp_of(args.parallel), costs)
    if schedule.placement != layout.placement:
        raise ValueError(f"{args.parallel.schedule} places stages {schedule.placement}, {layout} {layout.placement}")
    program = lower(schedule, DDP)
    direct, fuse, tp = MainGradients(), fused if args.run.compile else unfused, state.axis("tp")
    passes = partial(fused, dynamic=True) if args.run.compile else unfused
    fp8 = None if args.run.fp8 == "none" else RECIPES[args.run.fp8](tp, passes)
    place = Build(
        tp,
        args.parallel.sequence_parallel,
        DTYPES[args.run.dtype],
        state.world.device,
        args.run.seed,
        fuse=fuse,
        recompute=args.run.recompute == "light",
        accumulators=direct,
        gemms=fp8,
    )
    boundary = _boundary(args, place)
    seq_len, recompute = args.batch.seq_len, args.run.recompute == "block"
    attend = attention_by(args.run.attention, deterministic=args.run.deterministic)
    modules: dict[int, Transformer] = {}
    for s in layout.stages(state.world.rank):
        # A tied embedding whose two ends meet on this rank is one parameter.
        tied = modules[0].model.embed_tokens.weight if 0 in modules and modules[0].model.embed_tokens else None
        modules[s] = Transformer(
            args.model, parts[s], place, seq_len=seq_len, recompute=recompute, attend=attend, embedding=tied
        )
    stages = {s: Stage(s, module, boundary if s else None, direct.deferred) for s, module in modules.items()}
    weights = DataParallel(modules, state, bucket_mb=args.parallel.bucket_mb, direct=direct)
    config = args.optimizer
    optimizer = AdamW(
        weights,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fuse=partial(fused, dynamic=True) if args.run.compile else None,
    )
    optimizer.initialize(args.run.seed)
    ring = layout.vpp > 1 and layout.shape == "loop"
    link = Link.between(axis, state.world.device, state.axis, ring=ring)
    trainer = Trainer(
        Executor(program, axis.rank, stages, link, weights),
        weights,
        optimizer,
        clip_grad=config.clip_grad,
        steady=fp8.steady if fp8 else nullcontext,
    )
    forwards = lower(forward_only(axis.size, microbatches, layout.placement), DDP)
    return Built(modules, trainer, Executor(forwards, axis.rank, stages, link, weights), fp8)


def fused(function: Callable[..., Any], *, dynamic: bool | None = None) -> Callable[..., Any]:
    """One kernel for each chain of elementwise operations in `function`, made when shapes are first seen.

    `dynamic` makes one for all sizes at once: buckets have many. Activations have one, until a sample is drawn. On a
    GPU a kernel written by hand goes first.
    """
    compiled = torch.compile(function, dynamic=dynamic)
    return hand_written(function, compiled) if torch.cuda.is_available() else compiled


def stage_specs(args: Arguments) -> list[StageSpec]:
    """What of the model each stage holds."""
    layers = stage_layers(args)
    return [StageSpec(held, first=s == 0, last=s == len(layers) - 1) for s, held in enumerate(layers)]


def _boundary(args: Arguments, place: Build) -> TensorMeta:
    """What crosses between stages: activations [s(/t), b, h]."""
    seq = args.batch.seq_len // (place.tp.size if place.sequence_parallel else 1)
    return TensorMeta((seq, args.batch.micro_batch, args.model.hidden), place.dtype)
