"""The one rule of the language: what must have happened before an action may run."""

from __future__ import annotations

import numpy as np

from stretto.schedule.actions import (
    RECV_B,
    RECV_F,
    RESHARD,
    SEND_B,
    SEND_F,
    UNSHARD,
    Action,
    B,
    F,
    I,
    Ints,
    W,
    encode,
    mbs_of,
    ops_of,
    stages_of,
)
from stretto.schedule.ir import Schedule, Table


def requires(a: Action, s: Schedule) -> list[Action]:
    """The actions that must have finished before `a` may run.

    It covers schedules as generated, where an activation simply is on the next rank, and lowered programs,
    where it must have been sent and a receive must have been posted.
    """
    codes = np.array([a.code])
    return [Action.of_code(code) for code in needs(codes, s.table.find(codes), s.table)[:, 0].tolist() if code >= 0]


def needs(codes: Ints, positions: Ints, table: Table) -> Ints:
    """The codes of what each of these actions at these positions requires: [4, n], -1 for nothing.

    The only statement of this rule. Row by row: the UNSHARD of its visit; what its own stage must have done; what
    must have arrived from the stage before it, forward or back; the receive of that, once there are receives.
    """
    stage, op, mb = stages_of(codes), ops_of(codes), mbs_of(codes)
    found = np.full((4, len(codes)), -1, np.int64)
    visited, own, source, posted = found

    # F, B and I use parameters: those of the visit that the RESHARDs before it have left. W uses none.
    uses = (op == F) | (op == B) | (op == I)
    unsharded = table.stage[table.op == UNSHARD]
    rows = np.flatnonzero(uses & np.isin(stage, unsharded)) if len(unsharded) else np.zeros(0, np.int64)
    visited[rows] = encode(stage[rows], UNSHARD, _visits(positions[rows], stage[rows], table))

    back = (op == B) | (op == I)
    rows = np.flatnonzero(back | (op == SEND_F))
    own[rows] = encode(stage[rows], F, mb[rows])
    rows = np.flatnonzero(op == W)
    own[rows] = encode(stage[rows], I, mb[rows])
    rows = np.flatnonzero(op == SEND_B)
    own[rows] = _input_gradient(stage[rows], mb[rows], table)

    rows = np.flatnonzero((op == F) & (stage > 0))
    source[rows] = encode(stage[rows] - 1, F, mb[rows])
    _by_message(rows, codes, source, posted, (SEND_F, RECV_F, -1), table)
    rows = np.flatnonzero(back & (stage < table.stages - 1))
    source[rows] = _input_gradient(stage[rows] + 1, mb[rows], table)
    _by_message(rows, codes, source, posted, (SEND_B, RECV_B, 1), table)
    return found


def _input_gradient(stage: Ints, mb: Ints, table: Table) -> Ints:
    """The action that yields the gradient of the stage's input: I where this backward is split, else B."""
    split = encode(stage, I, mb)
    return np.where(table.find(split) >= 0, split, encode(stage, B, mb))


def _by_message(rows: Ints, codes: Ints, source: Ints, posted: Ints, way: tuple[int, int, int], table: Table) -> None:
    """Where these actions have a receive, what arrives is not the other stage's result but its message."""
    send, receive, step = way
    stage, mb = stages_of(codes[rows]), mbs_of(codes[rows])
    receives = encode(stage, receive, mb)
    there = table.find(receives) >= 0
    posted[rows[there]] = receives[there]
    source[rows[there]] = encode(stage[there] + step, send, mb[there])


def _visits(positions: Ints, stage: Ints, table: Table) -> Ints:
    """How many RESHARDs of its stage each position comes after: the number of its visit."""
    ends = np.flatnonzero(table.op == RESHARD)
    if not len(ends):
        return np.zeros(len(positions), np.int64)
    # All RESHARDs by stage and position as one ascending column, in which every position has its place.
    span = len(table) + 1
    column = np.sort(table.stage[ends] * span + ends)
    before = np.searchsorted(column, stage * span + np.maximum(positions, 0)) - np.searchsorted(column, stage * span)
    return before.astype(np.int64)
