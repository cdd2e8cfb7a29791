"""Which parts of which layers are recomputed in the backward: as said, or what a budget of memory asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Final

from stretto.arguments.errors import ConfigError, Violation
from stretto.arguments.schema import Arguments, RunConfig
from stretto.estimate.blocks import alike, first_of_kinds, moments_of, uncut
from stretto.estimate.kept import BLOCK, NOTHING, Parts, seconds, working
from stretto.estimate.memo import Memo
from stretto.estimate.sizes import entering_bytes, in_flight, in_halves, joined_bytes
from stretto.estimate.stages import stage_blocks
from stretto.notation.size import bytes_of
from stretto.schedule.blocks import StageBlock

PARTS: Final = ("norms", "activation", "attention", "projections")


def policy_of(args: Arguments, stage: int, memo: Memo | None = None) -> tuple[Parts, ...]:
    """What each layer of a stage recomputes; a planner has a `memo` for what a budget asks again and again.

    Raises ConfigError for a budget below what a stage keeps that recomputes all of its blocks.
    """
    run, layers = args.run, stage_blocks(args)[stage]
    if run.activation_budget is not None:
        memo = memo or Memo()
        return memo(_cheapest, args, stage, bytes_of(run.activation_budget), memo)
    chosen = _chosen(run)
    n = len(layers) if run.recompute_layers is None else min(run.recompute_layers, len(layers))
    return (chosen,) * n + (NOTHING,) * (len(layers) - n)


def policies_of(args: Arguments) -> list[tuple[Parts, ...]]:
    """The same of every stage. Raises ConfigError where one of them has no room."""
    return [policy_of(args, stage) for stage in range(len(stage_blocks(args)))]


def policy_of_further(args: Arguments) -> dict[int, Parts]:
    """What each layer that predicts further tokens recomputes: of a budget, which is for the others, all."""
    run = args.run
    return dict.fromkeys(args.model.further_layers, BLOCK if run.activation_budget is not None else _chosen(run))


def _chosen(run: RunConfig) -> Parts:
    """What a layer recomputes, if any does."""
    return {"none": NOTHING, "selective": frozenset(run.recompute_parts)}.get(run.recompute, BLOCK)


def activations(args: Arguments, stage: int, policy: Sequence[Parts]) -> int:
    """Bytes kept from forward to backward, of all microbatches in flight, where each layer of the stage recomputes its
    `policy`; and what is there while the largest of these regions is computed."""
    held, away, memo = stage_blocks(args), args.run.recompute == "offload", Memo()
    layers, halves = held[stage], in_halves(args, held[stage])
    each = [_saved(args, block, parts, halves, memo) for block, parts in zip(layers, policy, strict=True)]
    again = max(
        (_working(args, block, parts, halves, memo) for block, parts in zip(layers, policy, strict=True)), default=0
    )
    entering = entering_bytes(args)
    if stage == len(held) - 1:
        further = policy_of_further(args).items()
        each += [_saved(args, StageBlock(n), parts, False, memo) + joined_bytes(args) for n, parts in further]
    if away:  # what enters the last block, and what comes back for the one before; what is behind it stays
        stays = sum(each[max(0, len(layers) - 1) :])
        return in_flight(args, stage) * (stays + entering) + entering + again
    return in_flight(args, stage) * (sum(each) + entering) + again


def _saved(args: Arguments, block: StageBlock, parts: Parts, halves: bool, memo: Memo) -> int:
    """Bytes of a block from its forward to its backward, as the tape of its tensors has them."""
    alone = memo(uncut, args)
    return memo(moments_of, alone, alike(block, memo(first_of_kinds, alone)), parts, halves, False).kept


def _working(args: Arguments, block: StageBlock, parts: Parts, halves: bool, memo: Memo) -> int:
    """Bytes that are there while a region of the block is recomputed."""
    return _saved(args, block, NOTHING, halves, memo) if parts == BLOCK else working(args, block, parts)


def said(policy: Sequence[Parts]) -> str:
    """A policy in words: `8 x norms+activation, 24 x block`."""
    runs: list[tuple[Parts, int]] = []
    for parts in policy:
        runs[-1:] = [(parts, runs[-1][1] + 1)] if runs and runs[-1][0] == parts else [*runs[-1:], (parts, 1)]
    return ", ".join(f"{n} x {'+'.join(sorted(parts, key=(*PARTS, 'block').index)) or 'nothing'}" for parts, n in runs)


@dataclass(frozen=True)
class _Option:
    parts: Parts
    bytes: int
    working: int
    seconds: float


def _cheapest(args: Arguments, stage: int, budget: int, memo: Memo) -> tuple[Parts, ...]:
    """Layers step along the lower hull of seconds over bytes, the cheapest byte first, until all that is kept fits;
    then each goes back to the cheapest way that still does."""
    layers, flying, entering = stage_blocks(args)[stage], in_flight(args, stage), entering_bytes(args)
    alone = memo(uncut, args)
    kinds = [alike(block, memo(first_of_kinds, alone)) for block in layers]
    menus = {kind: memo(_menu, alone, kind, in_halves(args, layers), memo) for kind in kinds}
    hulls = {kind: list(pairwise(_hull(menu))) for kind, menu in menus.items()}
    chosen = [min(menus[kind], key=lambda each: each.seconds) for kind in kinds]

    def needed() -> int:
        largest = max((each.working for each in chosen), default=0)
        return flying * (sum(each.bytes for each in chosen) + entering) + largest

    steps = [(_price(*step), n, place) for place, kind in enumerate(kinds) for n, step in enumerate(hulls[kind])]
    for _, n, place in sorted(steps):
        if needed() <= budget:
            break
        chosen[place] = hulls[kinds[place]][n][1]
    if (least := needed()) > budget:
        problem = f"activation_budget = {args.run.activation_budget}, but stage {stage} needs {least:,} bytes for "
        problem += f"{flying} microbatch{'es' * (flying > 1)} of which every block is recomputed"
        hint = "raise --activation-budget, lower --micro-batch, or raise --tp, --cp or --pp"
        raise ConfigError([Violation("budget_holds_activations", ("run.activation_budget",), problem, hint=hint)])
    before: list[_Option] = []
    while before != chosen:  # the largest region may be gone with one of them, which makes room for others
        before = list(chosen)
        for place, kind in enumerate(kinds):
            reached = chosen[place]
            for chosen[place] in sorted(menus[kind], key=lambda each: each.seconds):
                if chosen[place].seconds >= reached.seconds:
                    chosen[place] = reached
                if needed() <= budget:
                    break
    return tuple(each.parts for each in chosen)


def _menu(args: Arguments, block: StageBlock, halves: bool, memo: Memo) -> list[_Option]:
    """All ways for a block."""
    m = args.model
    usable = [
        part
        for part in PARTS
        if not (part == "norms" and m.norm_placement == "post") and not (part == "projections" and m.experts)
    ]
    ways = [frozenset(some) for n in range(len(usable) + 1) for some in combinations(usable, n)]
    return [
        _Option(
            parts,
            _saved(args, block, parts, halves, memo),
            _working(args, block, parts, halves, memo),
            seconds(args, block, parts),
        )
        for parts in (*ways, BLOCK)
    ]


def _hull(menu: Sequence[_Option]) -> list[_Option]:
    """From the quickest to the leanest, those that are on the lower hull: each byte costs more than those before."""
    found = [min(menu, key=lambda each: (each.seconds, each.bytes))]
    while leaner := [each for each in menu if each.bytes < found[-1].bytes]:
        found.append(min(leaner, key=lambda each: (_price(found[-1], each), each.bytes)))
    return found


def _price(now: _Option, after: _Option) -> float:
    """Seconds for each byte that a step frees."""
    return (after.seconds - now.seconds) / (now.bytes - after.bytes)
