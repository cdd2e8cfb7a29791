"""The transformer of `stretto train`, from its arguments to an `Assembly` on this rank."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from stretto.arguments.pipeline import vpp_of
from stretto.arguments.schema import Arguments, OptimizerConfig
from stretto.distributed import AdamWRule, LionRule, MainGradients, Rule, SGDRule
from stretto.estimate import stage_costs, stage_layers
from stretto.kernels import hand_written
from stretto.models import StageSpec, Transformer, attention_by
from stretto.parallel_state import ParallelState
from stretto.pipeline_parallel import TensorMeta
from stretto.schedule import schedule_for
from stretto.schedule.search import split
from stretto.schedule.sharding import MODES
from stretto.tensor_parallel import Build, unfused
from stretto.tensor_parallel.fp8 import RECIPES, Fp8
from stretto.train.assemble import Assembly, assemble
from stretto.train.costs_file import read_costs, write_costs
from stretto.train.dtypes import DTYPES
from stretto.train.optimizers import flat


@dataclass(frozen=True)
class Built(Assembly[Transformer]):
    """The transformer that arguments describe, ready to train; fp8 where it is used."""

    fp8: Fp8 | None = None


def build(args: Arguments, state: ParallelState, *, draw: bool = True) -> Built:
    """Build this rank's part of the run, with initial weights drawn from `run.seed`, or zeros that are filled later."""
    microbatches = args.batch.microbatches(state.layout.size("dp"))
    parts = stage_specs(args)
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
        recompute=args.run.recompute == "selective",
        accumulators=direct,
        gemms=fp8,
        allocate=False,
    )
    seq_len, recompute = args.batch.seq_len, args.run.recompute == "block"
    attend = attention_by(args.run.attention, deterministic=args.run.deterministic)
    made_here: dict[int, Transformer] = {}

    def make(s: int) -> Transformer:
        # A tied embedding whose two ends meet on this rank is one parameter.
        first = made_here[0].model.embed_tokens if 0 in made_here else None
        made_here[s] = Transformer(
            args.model,
            parts[s],
            place,
            seq_len=seq_len,
            recompute=recompute,
            attend=attend,
            embedding=None if first is None else first.weight,
        )
        return made_here[s]

    config, auto = args.optimizer, args.parallel.schedule == "auto"
    sizes = args.parallel.schedule, state.axis("pp").size, microbatches, vpp_of(args.parallel)
    known = read_costs(args, state) if auto else None
    begins = schedule_for(*sizes, known or stage_costs(args))
    made = assemble(
        state,
        make,
        optimizer=flat(update_rule(config), fuse=partial(fused, dynamic=True) if args.run.compile else None),
        schedule=begins if known or not auto else split(begins),
        search=partial(schedule_for, *sizes) if auto and not known else None,
        keep_cost=partial(write_costs, args),
        post_validate=config.post_validate,
        boundary=_boundary(args, place),
        seed=args.run.seed,
        clip_grad=config.clip_grad,
        bucket_mb=args.parallel.bucket_mb,
        direct=direct,
        sharding=MODES[args.parallel.sharding],
        keep_units=args.parallel.keep_units,
        draw=draw,
        steady=fp8.steady if fp8 else nullcontext,
    )
    made.stepper.executor.check_finite = args.run.check_finite
    return Built(made.stages, made.stepper, made.evaluator, made.busy, made.tuner, fp8)


def fused(function: Callable[..., Any], *, dynamic: bool | None = None) -> Callable[..., Any]:
    """One kernel for each chain of elementwise operations in `function`, made when shapes are first seen.

    `dynamic` makes one for all sizes at once: buckets have many. Activations have one, until a sample is drawn. On a
    GPU a kernel written by hand goes first.
    """
    compiled = torch.compile(function, dynamic=dynamic)
    return hand_written(function, compiled) if torch.cuda.is_available() else compiled


def update_rule(config: OptimizerConfig) -> Rule:
    """The update rule of the settings."""
    betas, decay = (config.beta1, config.beta2), config.weight_decay
    if config.optimizer == "sgd":
        return SGDRule(config.momentum, decay)
    return LionRule(betas, decay) if config.optimizer == "lion" else AdamWRule(betas, config.eps, decay)


def stage_specs(args: Arguments) -> list[StageSpec]:
    """What of the model each stage holds."""
    layers = stage_layers(args)
    return [StageSpec(held, first=s == 0, last=s == len(layers) - 1) for s, held in enumerate(layers)]


def _boundary(args: Arguments, place: Build) -> TensorMeta:
    """What crosses between stages: activations [s(/t), b, h]."""
    seq = args.batch.seq_len // (place.tp.size if place.sequence_parallel else 1)
    return TensorMeta((seq, args.batch.micro_batch, args.model.hidden), place.dtype)
