"""A ledger of a rank's memory at the moment of a step at which it holds most.

What stays through the step is there to the byte (`steady`). What comes and goes is that of one moment: a peak is the
largest sum of a moment, not a sum of what each part of a step needs at most (`moments`). All in front of any
allocator's rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Final, NamedTuple

from stretto.arguments.elsewhere import graphed
from stretto.arguments.pipeline import shape_of, vpp_of
from stretto.arguments.schema import Arguments
from stretto.estimate.context import kind_of
from stretto.estimate.moments import StageActivations, StageMoment, stage_activations
from stretto.estimate.sizes import held_at_once, in_flight
from stretto.estimate.stages import stage_layers
from stretto.estimate.steady import Steady, steady
from stretto.estimate.workspace import passing, tables, workspaces
from stretto.layout.stages import placement
from stretto.schedule.sharding import MODES


@dataclass(frozen=True)
class Ledger:
    """Bytes of one rank, by what they are for, at the moment at which they are most. Names are what is printed."""

    weights: int
    """Kept through the step: all, or a shard."""
    gradients: int
    """Kept through the step, fp32 or wider."""
    masters: int
    """fp32 copies of narrower weights, or what is missing to them."""
    optimizer: int
    """State of the update rule."""
    streamed: int
    """Chunks of both on the device, where they lie in the host's memory."""
    gathered: int
    """Sections of the stage that are whole at that moment, where weights are sharded."""
    reducing: int
    """Gradients that fill or are reduced then, where gradients are sharded."""
    activations: int
    """What forwards keep for their backwards then, of all microbatches under way."""
    working: int
    """What the layer or the head that is at work then has made, or has not let go of yet."""
    quantized: int
    """Weights in FP8, beside those that are trained."""
    passing: int
    """Messages between stages that are not known to be over."""
    workspaces: int
    """What libraries work in, messages between GPUs wait in, and the allocator rounds up; cosines and sines."""
    host: int = 0
    """Masters and state of the update rule in the host's memory."""
    moment: str = ""
    """When that is."""

    @property
    def items(self) -> Mapping[str, int]:
        """What is on the device, by name."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("host", "moment")}

    @property
    def total(self) -> int:
        """All of the device's at once."""
        return sum(self.items.values())


def ledger(args: Arguments, stage: int, *, embedding: bool = True) -> Ledger:
    """The ledger of each rank that holds a pipeline stage; without `embedding`, one whose tied embedding is that of
    another stage on the rank."""
    halves = _Halves.of(args)
    found = _Stage.of(halves, stage, embedding=embedding)
    return _peak(halves, [found], in_flight(halves.passing, stage) * found.activations.kept)


def rank_ledger(args: Arguments, rank: int) -> Ledger:
    """The ledger of each rank at a place along the pipeline, of all of its stages."""
    return _rank_ledger(_Halves.of(args), rank)


def fullest(args: Arguments) -> int:
    """Bytes of the rank that holds most."""
    halves = _Halves.of(args)
    return max(_rank_ledger(halves, rank).total for rank in _unlike(halves.passing))


def fitting(args: Arguments, limit: float) -> dict[str, tuple[int, bool]]:
    """For each mode of sharding: bytes of the fullest rank, and whether they fit into `limit` bytes."""
    found = {}
    for mode in MODES:
        most = fullest(graphed(replace(args, parallel=replace(args.parallel, sharding=mode))))  # type: ignore[arg-type]
        found[mode] = most, most <= limit
    return found


_PLAIN: Final = Arguments()


class _Halves(NamedTuple):
    """The settings that what is stored follows from, and those of what passes: a planner changes one or the other."""

    whole: Arguments
    stored: Arguments
    passing: Arguments

    @classmethod
    def of(cls, args: Arguments) -> _Halves:
        """Of a run."""
        b, r = args.batch, args.run
        several = b.microbatches(args.parallel.dp) > 1
        batch = replace(_PLAIN.batch, seq_len=b.seq_len, micro_batch=1)
        batch = replace(batch, global_batch=(args.parallel.dp or 1) * (1 + several))
        run = replace(_PLAIN.run, dtype=r.dtype, device=r.device, fp8=r.fp8)
        both = replace(_PLAIN, model=args.model, tuning=args.tuning, run=run)
        stored = replace(both, parallel=args.parallel, batch=batch, optimizer=args.optimizer)
        unsharded = replace(args.parallel, sharding="none")
        return cls(args, stored, replace(both, parallel=unsharded, batch=b, data=args.data, run=r))


class _Stage(NamedTuple):
    """A stage on a rank."""

    steady: Steady
    activations: StageActivations

    @classmethod
    def of(cls, halves: _Halves, stage: int, *, embedding: bool) -> _Stage:
        return cls(_stored(halves.stored, stage, embedding), _passing(halves.passing, stage))


@lru_cache(maxsize=4096)
def _passing(args: Arguments, stage: int) -> StageActivations:
    """What does not follow from what is sharded."""
    return stage_activations(args, stage)


@lru_cache(maxsize=4096)
def _stored(args: Arguments, stage: int, embedding: bool) -> Steady:
    """What follows from neither microbatches nor recomputation: a planner asks for it again and again."""
    return steady(args, stage, embedding=embedding)


def _rank_ledger(halves: _Halves, rank: int) -> Ledger:
    args = halves.passing
    p = args.parallel
    homes = placement(p.pp, vpp_of(p), shape_of(p))
    mine = [s for s, home in enumerate(homes) if home == rank]
    last = len(homes) - 1  # its tied embedding is that of the first stage, where both are here
    each = [_Stage.of(halves, s, embedding=not (0 < s == last and 0 in mine)) for s in mine]
    under_way = [in_flight(args, s) for s in mine]
    kept = sum(n * one.activations.kept for n, one in zip(under_way, each, strict=True))
    if len(each) > 1:  # its stages do not all hold most at the same time
        kept = kept * held_at_once(args, rank) // sum(under_way)
    return _peak(halves, each, kept)


def _peak(halves: _Halves, stages: list[_Stage], kept: int) -> Ledger:
    """The largest of the moments of a rank that keeps so much of all microbatches under way: one of these is at it."""
    args = halves.whole

    def at(one: _Stage, moment: StageMoment) -> tuple[int, int, int]:
        """Gathered, reducing, and kept by all then."""
        sections = one.steady.sections
        gathered = sections.gathered(moment.section, back=moment.back)
        filling = sections.filling(moment.section, back=moment.fills)
        return gathered, filling, max(0, kept - one.activations.kept) + moment.kept

    every = [(sum(at(one, m)) + m.working, one, m) for one in stages for m in one.activations.moments]
    _, one, moment = max(every, key=lambda each: each[0])
    gathered, filling, held = at(one, moment)

    def total(name: str) -> int:
        return sum(getattr(each.steady, name) for each in stages)

    return Ledger(
        weights=total("weights"),
        gradients=total("gradients"),
        masters=total("masters"),
        optimizer=total("optimizer"),
        streamed=max(each.steady.streamed for each in stages),
        gathered=gathered,
        reducing=filling + max(each.steady.filling for each in stages),
        activations=held,
        working=moment.working,
        quantized=total("quantized"),
        passing=passing(args),
        workspaces=workspaces(args) + tables(args) + total("spare"),
        host=total("host"),
        moment=moment.name,
    )


@lru_cache(maxsize=64)
def _unlike(args: Arguments) -> Iterable[int]:
    """Ranks of the pipeline of which one holds most: of those whose stages are alike, the one with most under way."""
    p = args.parallel
    if args.run.activation_budget is not None or args.tuning.freeze:
        return range(p.pp)  # what a stage computes once more, or trains, follows from more than its layers
    layers, homes = stage_layers(args), placement(p.pp, vpp_of(p), shape_of(p))
    alike: dict[object, list[int]] = {}
    for rank in range(p.pp):
        mine = [s for s, home in enumerate(homes) if home == rank]
        held = tuple(tuple(kind_of(args, n) for n in layers[s]) for s in mine)
        alike.setdefault((0 in mine, len(homes) - 1 in mine, held), []).append(rank)
    return [max(each, key=lambda rank: held_at_once(args, rank)) for each in alike.values()]
