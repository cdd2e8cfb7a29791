"""Blocks of runs that differ in how the model is cut into stages, of those alike one: the keys of a memo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stretto.arguments.schema import Arguments
from stretto.estimate.block_tape import BlockMoments, block_moments, halves_moments
from stretto.estimate.context import Kind, kind_of
from stretto.estimate.kept import Parts
from stretto.schedule.blocks import StageBlock


def moments_of(args: Arguments, block: StageBlock, parts: Parts, halves: bool, first: bool) -> BlockMoments:
    """Of a block that recomputes `parts`; in `halves`, whether it is the `first` of its stage."""
    return halves_moments(args, block, parts, first=first) if halves else block_moments(args, block, parts)


def uncut(args: Arguments) -> Arguments:
    """The settings that a block follows from: without those that cut the model into stages, order or repeat them."""
    parallel = replace(args.parallel, pp=1, dp=1, schedule="1f1b", vpp=None, vpp_shape=None, stage_layers=None)
    batch = replace(args.batch, global_batch=args.batch.micro_batch)
    run = replace(args.run, recompute="none", nproc=None, cuda_graphs=None, activation_budget=None)
    return replace(args, parallel=parallel, batch=batch, run=run)


def first_of_kinds(args: Arguments) -> list[int]:
    """For each layer, those that predict further tokens among them, the first that is like it."""
    first: dict[Kind, int] = {}
    layers = range(args.model.further_layers.stop)
    return [first.setdefault(kind_of(args, StageBlock(layer)), layer) for layer in layers]


def alike(block: StageBlock, first: Sequence[int]) -> StageBlock:
    """The same part of the first layer that is like its layer, by `first_of_kinds`."""
    return block._replace(layer=first[block.layer])
