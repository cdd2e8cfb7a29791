"""From order to program: insert the messages, and the three verbs of the weights.

All messages stand in one global order that every rank's list follows. So the k-th send from a to b always
meets the k-th receive of b from a, and no order of arrival can deadlock, not even if every send and every
receive blocked until its partner came: whichever message is next in the global order, both of its ranks
have nothing else before it.

The order is that of a simulation: a message stands where its producer ends. On the receiving rank that is
before any action still running then, so the receive is posted early and the transfer overlaps it.
"""

from __future__ import annotations

from stretto.schedule.ir import Action, Op, Schedule
from stretto.schedule.sharding import DDP, Sharding
from stretto.schedule.simulate import Cost, simulate


def lower(s: Schedule, sharding: Sharding = DDP, cost: Cost | None = None) -> Schedule:
    """The program of a schedule: the same computation, with messages, UNSHARD, REDUCE and RESHARD.

    For each stage, UNSHARD is the first word (before its first receive is posted, so that a gather of
    parameters overlaps the wait for input), REDUCE stands directly before the last B or W, and RESHARD,
    if parameters are sharded, is the last word. Each is said once: whole parameters stay for the step.
    `cost` decides the order of the messages. Raises `DeadlockError` if the schedule has one.
    """
    return _with_weights(_with_messages(s, cost), sharding)


def _with_messages(s: Schedule, cost: Cost | None) -> Schedule:
    out: list[list[Action]] = [[] for _ in s.ranks]
    # The sort is stable and simulate yields an order that can happen: ties, even of actions that take no
    # time, keep a producer before its consumer.
    for span in sorted(simulate(s, cost), key=lambda x: x.end):
        a = span.action
        out[span.rank].append(a)
        to = _consumer(a, s)
        if to is not None and s.crosses(a.stage, to):
            way = "F" if a.op is Op.F else "B"
            out[span.rank].append(Action(a.stage, Op(f"SEND_{way}"), a.mb))
            out[s.placement[to]].append(Action(to, Op(f"RECV_{way}"), a.mb))
    return Schedule(s.placement, s.num_microbatches, tuple(map(tuple, out)))


def _consumer(a: Action, s: Schedule) -> int | None:
    """The stage that waits for the result of this action, if any does."""
    match a.op:
        case Op.F if a.stage + 1 < s.num_stages:
            return a.stage + 1
        case Op.B | Op.I if a.stage > 0:
            return a.stage - 1
        case _:
            return None


def _with_weights(s: Schedule, sharding: Sharding) -> Schedule:
    def rank(order: tuple[Action, ...]) -> tuple[Action, ...]:
        first: dict[int, Action] = {}
        last: dict[int, Action] = {}
        last_gradient: dict[int, Action] = {}
        for a in order:
            first.setdefault(a.stage, a)
            last[a.stage] = a
            if a.op in (Op.B, Op.W):
                last_gradient[a.stage] = a
        out: list[Action] = []
        for a in order:
            if a is first[a.stage]:
                out.append(Action(a.stage, Op.UNSHARD))
            if a is last_gradient.get(a.stage):
                out.append(Action(a.stage, Op.REDUCE))
            out.append(a)
            if sharding.params and a is last[a.stage]:
                out.append(Action(a.stage, Op.RESHARD))
        return tuple(out)

    return Schedule(s.placement, s.num_microbatches, tuple(map(rank, s.ranks)))
