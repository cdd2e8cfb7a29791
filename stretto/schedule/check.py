"""Is it a schedule? Every violation at once, each by the name of the action."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from stretto.schedule.actions import COMPUTE, NUMBER, Action, Op, encode
from stretto.schedule.ir import Schedule, ScheduleError, Table
from stretto.schedule.simulate import simulate


def check(s: Schedule) -> None:
    """Raise `ScheduleError` unless every microbatch goes forward and back through every stage, once.

    Lists all of: actions repeated, on the wrong rank, of no stage or microbatch there is, missing, a backward
    both whole and split; or else the actions at which ranks would wait for ever (`DeadlockError`).
    """
    reject(placement_violations(s))
    reject([*address_violations(s, COMPUTE), *completeness_violations(s)])
    simulate(s)


def reject(violations: Sequence[str]) -> None:
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
    t, last = s.table, max(s.num_stages - 1, 0)
    unknown = ~np.isin(t.op, [NUMBER[op] for op in allowed])
    homeless = t.stage >= s.num_stages
    astray = ~homeless & (np.asarray(s.placement)[np.minimum(t.stage, last)] != t.rank)
    beyond = (t.op < NUMBER[Op.UNSHARD]) & (t.mb >= s.num_microbatches)
    for i in np.flatnonzero(unknown | homeless | astray | beyond).tolist():
        a, rank = Action.of_code(int(t.codes[i])), int(t.rank[i])
        if unknown[i]:
            yield f"{a} on rank {rank}: only a lowered program has {a.op}"
        if homeless[i]:
            yield f"{a} on rank {rank}: there is no stage {a.stage} of {s.num_stages}"
        if astray[i]:
            yield f"{a} on rank {rank}: stage {a.stage} lies on rank {s.placement[a.stage]}"
        if beyond[i]:
            yield f"{a} on rank {rank}: there is no microbatch {a.mb} of {s.num_microbatches}"
    codes, first, times = np.unique(t.codes, return_index=True, return_counts=True)
    repeated = np.flatnonzero(times > 1)
    for k in repeated[np.argsort(first[repeated])].tolist():
        yield f"{Action.of_code(int(codes[k]))} is there {times[k]} times"


def completeness_violations(s: Schedule) -> Iterator[str]:
    """Does each microbatch go forward and back through each stage, the backward whole or in two halves?"""
    if s.num_stages * s.num_microbatches > s.num_actions:
        yield f"{s.num_actions} actions cannot take {s.num_microbatches} microbatches through {s.num_stages} stages"
        return
    stage, mb = (column.ravel() for column in np.indices((s.num_stages, s.num_microbatches)))
    f, b, i, w = (s.table.find(encode(stage, NUMBER[op], mb)) >= 0 for op in (Op.F, Op.B, Op.I, Op.W))
    complete = f & np.where(b, ~i & ~w, i & w)
    for k in np.flatnonzero(~complete).tolist():
        yield from _incomplete(int(stage[k]), int(mb[k]), s.table)


def _incomplete(stage: int, mb: int, table: Table) -> Iterator[str]:
    actions = [Action(stage, op, mb) for op in (Op.F, Op.B, Op.I, Op.W)]
    f, b, i, w = actions
    there = dict(zip(actions, table.find(np.array([a.code for a in actions])) >= 0, strict=True))
    if not there[f]:
        yield f"{f} is missing"
    halves = [half for half in (i, w) if there[half]]
    if there[b] and halves:
        yield f"{b} is a whole backward, but there is {' and '.join(map(str, halves))} as well"
    elif not there[b] and not halves:
        yield f"{b} is missing (or {i} and {w})"
    elif not there[b] and len(halves) == 1:
        yield f"{w if halves == [i] else i} is missing, the other half of {halves[0]}"
