"""A ledger of a rank's memory at the moment of a step at which it holds most.

What stays through the step is there to the byte (`steady`). What comes and goes is that of one moment: a peak is the
largest sum of a moment, not a sum of what each part of a step needs at most (`moments`). All in front of any
allocator's rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import inf
from typing import Final, NamedTuple

from stretto.arguments.elsewhere import graphed
from stretto.arguments.schema import Arguments
from stretto.estimate.context import kind_of
from stretto.estimate.memo import Memo
from stretto.estimate.moments import StageActivations, StageMoment, stage_activations
from stretto.estimate.sections import Sections
from stretto.estimate.sizes import held_at_once, in_flight
from stretto.estimate.stages import stage_blocks
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
    """What forwards keep for their backwards then, of all microbatches in flight."""
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
    settings, memo = _Settings.of(args), Memo()
    held = Held((stage,), (steady(settings.stored, stage, embedding=embedding, memo=memo),))
    found = stage_activations(settings.passing, stage, memo)
    return _peak(settings.whole, held, (found,), in_flight(settings.passing, stage) * found.kept)


def rank_ledger(args: Arguments, rank: int, memo: Memo | None = None) -> Ledger:
    """The ledger of each rank at a place along the pipeline, of all of its stages."""
    settings, memo = _Settings.of(args), memo or Memo()
    return _rank_ledger(settings, rank, memo(_held, settings.stored, rank, memo), memo)


def held_by(args: Arguments, rank: int, memo: Memo) -> Held:
    """What the same rank holds through the step, stage by stage."""
    return memo(_held, _Settings.of(args).stored, rank, memo)


def fullest(args: Arguments, *, enough: float = inf, memo: Memo | None = None) -> int:
    """Bytes of the rank that holds most; where these are more than `enough`, perhaps fewer, but still more than that.

    A planner has a `memo` for what many of its runs share.
    """
    memo, settings = memo or Memo(), _Settings.of(args)
    ranks = {rank: memo(_held, settings.stored, rank, memo) for rank in memo(_unlike, settings.passing, memo)}
    # What stays is quick to tell, and often too much.
    if (least := max(_at_rest(args, held).total for held in ranks.values())) > enough:
        return least
    most = 0
    for rank, held in ranks.items():
        if most <= enough:
            most = max(most, _rank_ledger(settings, rank, held, memo).total)
    return most


def fitting(args: Arguments, limit: float) -> dict[str, tuple[int, bool]]:
    """For each mode of sharding: bytes of the fullest rank, and whether they fit into `limit` bytes."""
    found = {}
    for mode in MODES:
        most = fullest(graphed(replace(args, parallel=replace(args.parallel, sharding=mode))))  # type: ignore[arg-type]
        found[mode] = most, most <= limit
    return found


_PLAIN: Final = Arguments()


class _Settings(NamedTuple):
    """The settings that what is stored follows from, and those of what passes: a planner changes one or the other."""

    whole: Arguments
    stored: Arguments
    passing: Arguments

    @classmethod
    def of(cls, args: Arguments) -> _Settings:
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


class Held(NamedTuple):
    """The stages of a rank, and what it holds of each through the step."""

    stages: tuple[int, ...]
    steady: tuple[Steady, ...]

    def total(self, name: str) -> int:
        """Of all of them."""
        return sum(getattr(each, name) for each in self.steady)


def _held(args: Arguments, rank: int, memo: Memo) -> Held:
    """What follows from neither microbatches nor recomputation: a planner asks for it again and again."""
    like, homes = memo(_like, args), _homes(args)
    mine = tuple(s for s, home in enumerate(homes) if home == rank)
    last = len(homes) - 1  # its tied embedding is that of the first stage, where both are here
    own = [not (0 < s == last and 0 in mine) for s in mine]
    return Held(mine, tuple(memo(_steady, args, like[s], e, memo) for s, e in zip(mine, own, strict=True)))


def _steady(args: Arguments, stage: int, embedding: bool, memo: Memo) -> Steady:
    return steady(args, stage, embedding=embedding, memo=memo)


def _rank_ledger(settings: _Settings, rank: int, held: Held, memo: Memo) -> Ledger:
    args = settings.passing
    like = memo(_like, args)
    each = tuple(memo(stage_activations, args, like[stage], memo) for stage in held.stages)
    under_way = [in_flight(args, stage) for stage in held.stages]
    kept = sum(n * one.kept for n, one in zip(under_way, each, strict=True))
    if len(each) > 1:  # its stages do not all hold most at the same time
        kept = kept * held_at_once(args, rank) // sum(under_way)
    return _peak(settings.whole, held, each, kept)


def _peak(args: Arguments, held: Held, activations: Sequence[StageActivations], kept: int) -> Ledger:
    """The largest of the moments of a rank that keeps so much of all microbatches in flight: one of these is at it."""

    def at(sections: Sections, moment: StageMoment, others: int) -> tuple[int, int, int]:
        """Gathered, reducing, and kept by all then."""
        gathered = sections.gathered(moment.section, back=moment.back)
        return gathered, sections.filling(moment.section, back=moment.fills), others + moment.kept

    every = [
        (sum(found := at(stays.sections, moment, max(0, kept - one.kept))) + moment.working, found, moment)
        for stays, one in zip(held.steady, activations, strict=True)
        for moment in one.moments
    ]
    _, (gathered, filling, keeping), moment = max(every, key=lambda each: each[0])
    rest = _at_rest(args, held)
    return replace(
        rest,
        gathered=gathered,
        reducing=rest.reducing + filling,
        activations=keeping,
        working=moment.working,
        moment=moment.name,
    )


def _at_rest(args: Arguments, held: Held) -> Ledger:
    """The ledger without what comes and goes with the moments of a step."""
    return Ledger(
        weights=held.total("weights"),
        gradients=held.total("gradients"),
        masters=held.total("masters"),
        optimizer=held.total("optimizer"),
        streamed=max(each.streamed for each in held.steady),
        gathered=0,
        reducing=max(each.filling for each in held.steady),
        activations=0,
        working=0,
        quantized=held.total("quantized"),
        passing=passing(args),
        workspaces=workspaces(args) + tables(args) + held.total("spare"),
        host=held.total("host"),
    )


def _unlike(args: Arguments, memo: Memo) -> Iterable[int]:
    """Ranks of the pipeline of which one holds most: of those whose stages are alike, the one with most in flight."""
    like, homes = memo(_like, args), _homes(args)
    alike: dict[object, list[int]] = {}
    for rank in range(args.parallel.pp):
        alike.setdefault(tuple(like[s] for s, home in enumerate(homes) if home == rank), []).append(rank)
    return [max(each, key=lambda rank: held_at_once(args, rank)) for each in alike.values()]


def _like(args: Arguments) -> Sequence[int]:
    """For each stage the first that is like it: where all follows from the kinds of its layers and from the ends."""
    layers = stage_blocks(args)
    if args.run.activation_budget is not None or args.tuning.freeze:
        return range(len(layers))  # what a stage recomputes, or trains, follows from more than that
    kinds = {block: kind_of(args, block) for held in layers for block in held}
    first, last = dict[object, int](), len(layers) - 1
    return [first.setdefault((s == 0, s == last, *(kinds[each] for each in held)), s) for s, held in enumerate(layers)]


def _homes(args: Arguments) -> tuple[int, ...]:
    """The rank of each stage."""
    p = args.parallel
    return placement(p.pp, p.stages_per_rank, p.shape)
