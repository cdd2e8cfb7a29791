"""Is it a schedule? Every violation at once, each by the name of the action."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from stretto.schedule.ir import COMPUTE, WEIGHTS, Action, Op, Schedule, ScheduleError
from stretto.schedule.simulate import simulate


def check(s: Schedule) -> None:
    """Raise `ScheduleError` unless every microbatch goes forward and back through every stage, once.

    Lists all of: actions repeated, on the wrong rank, of no stage or microbatch there is, missing, a backward
    both whole and split; or else the actions at which ranks would wait for ever (`DeadlockError`).
    """
    refuse(placement_violations(s))
    refuse([*address_violations(s, COMPUTE), *completeness_violations(s)])
    simulate(s)


def refuse(violations: Sequence[str]) -> None:
    """Raise `ScheduleError` with all of these, if there are any."""
    if violations:
        heading = [f"{len(violations)} violations:"] if len(violations) > 1 else []
        raise ScheduleError("\n".join([*heading, *violations]))


def placement_violations(s: Schedule) -> list[str]:
    """Do the stages lie on exactly the ranks that there are, and is there work at all?"""
    found = []
    if s.num_microbatches < 1:
        found.append(f"{s.num_microbatches} microbatches: there must be at least 1")
    if not s.ranks:
        found.append("0 ranks: there must be at least 1")
    homes = set(s.placement)
    found += [f"rank {rank} holds no stage" for rank in range(s.num_ranks) if rank not in homes]
    found += [
        f"stage {stage} lies on rank {rank}, there are {s.num_ranks} ranks"
        for stage, rank in enumerate(s.placement)
        if not 0 <= rank < s.num_ranks
    ]
    return found


def address_violations(s: Schedule, allowed: Sequence[Op]) -> Iterator[str]:
    """Is each action of a kind, stage and microbatch that there is, on its own rank, and said once?"""
    for rank, order in enumerate(s.ranks):
        for a in order:
            if a.op not in allowed:
                yield f"{a} on rank {rank}: only a lowered program has {a.op}"
            if not 0 <= a.stage < s.num_stages:
                yield f"{a} on rank {rank}: there is no stage {a.stage} of {s.num_stages}"
            elif s.placement[a.stage] != rank:
                yield f"{a} on rank {rank}: stage {a.stage} lies on rank {s.placement[a.stage]}"
            if a.op not in WEIGHTS and not 0 <= a.mb < s.num_microbatches:
                yield f"{a} on rank {rank}: there is no microbatch {a.mb} of {s.num_microbatches}"
    for a, times in Counter(a for order in s.ranks for a in order).items():
        if times > 1:
            yield f"{a} is there {times} times"


def completeness_violations(s: Schedule) -> Iterator[str]:
    """Does each microbatch go forward and back through each stage, the backward whole or in two halves?"""
    for stage in range(s.num_stages):
        for mb in range(s.num_microbatches):
            f, b, i, w = (Action(stage, op, mb) for op in (Op.F, Op.B, Op.I, Op.W))
            if f not in s.actions:
                yield f"{f} is missing"
            halves = [half for half in (i, w) if half in s.actions]
            if b in s.actions and halves:
                yield f"{b} is a whole backward, but there is {' and '.join(map(str, halves))} as well"
            elif b not in s.actions and not halves:
                yield f"{b} is missing (or {i} and {w})"
            elif b not in s.actions and len(halves) == 1:
                yield f"{w if halves == [i] else i} is missing, the other half of {halves[0]}"
