"""Is it a program? What `check` asks, and of the messages and the verbs of the weights as well."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from stretto.schedule.actions import RECV_B, RECV_F, RECVS, SEND_B, SEND_F, SENDS, Action, Op
from stretto.schedule.check import (
    address_violations,
    completeness_violations,
    placement_violations,
    reject,
)
from stretto.schedule.ir import Schedule
from stretto.schedule.requires import needs
from stretto.schedule.sharding import DDP, Sharding
from stretto.schedule.simulate import DeadlockError, simulate


def check_lowered(s: Schedule, sharding: Sharding = DDP) -> None:
    """Raise `ScheduleError` unless `s` is a program that an executor can run under this sharding.

    Beyond `check`: each activation and gradient that changes ranks is sent once and received once; the k-th
    send from a to b is what the k-th receive of b from a expects; no rank waits for ever (`DeadlockError`),
    not even if each send blocked until its receive is reached and the other way round; and UNSHARD, REDUCE
    and RESHARD stand where `lower` says they do.
    """
    reject(placement_violations(s))
    reject(
        [
            *address_violations(s, tuple(Op)),
            *completeness_violations(s),
            *_message_violations(s),
            *_weight_violations(s, sharding),
        ]
    )
    reject(list(_pairing_violations(s)))
    simulate(s)
    _play_rendezvous(s)


def _message_violations(s: Schedule) -> Iterator[str]:
    """Is all that changes ranks sent and received, and nothing else?"""
    sends = [
        send
        for stage in range(s.num_stages - 1)
        if s.crosses(stage, stage + 1)
        for mb in range(s.num_microbatches)
        for send in (Action(stage, Op.SEND_F, mb), Action(stage + 1, Op.SEND_B, mb))
    ]
    needed = {*sends, *map(_receive_of, sends)}
    there = {a for a in s.actions if a.op in (*SENDS, *RECVS)}
    yield from (f"{a} is missing" for a in sorted(needed - there))
    yield from (f"{a} is a message that nothing needs" for a in sorted(there - needed))


def _weight_violations(s: Schedule, sharding: Sharding) -> Iterator[str]:
    """Do the verbs of the weights stand where the executor relies on them?"""
    for stage in range(s.num_stages):
        yield from _visit_violations(stage, [a for a in s.ranks[s.placement[stage]] if a.stage == stage], sharding)
        yield from _reduce_violations(stage, [a for a in s.ranks[s.placement[stage]] if a.stage == stage], sharding)


def _visit_violations(stage: int, order: list[Action], sharding: Sharding) -> Iterator[str]:
    """Do UNSHARD and RESHARD take turns, in the order of their visits, around each F, B and I?"""
    whole, visit = False, 0
    for a in order:
        if a.op is Op.UNSHARD:
            if whole or a.mb != visit:
                yield f"{a} is there, but {'visit' if whole else 'the next visit is'} {visit}{' is not over' * whole}"
            whole, visit = True, a.mb
        elif a.op is Op.RESHARD:
            if not sharding.params:
                yield f"{a} is there, but the parameters are not sharded"
            if not whole or a.mb != visit:
                yield f"{a} is there, but {Action(stage, Op.UNSHARD, a.mb)} is not the last before it"
            whole, visit = False, a.mb + 1
        elif a.op in (Op.F, Op.B, Op.I) and not whole:
            yield f"{Action(stage, Op.UNSHARD, visit)} must come before {a}"
            return
    if sharding.params and whole:
        yield f"{Action(stage, Op.RESHARD, visit)} must come after all uses of stage {stage}"


def _reduce_violations(stage: int, order: list[Action], sharding: Sharding) -> Iterator[str]:
    """Does REDUCE stand directly before the last weight gradient of the stage, or before each?"""
    gradients = [at for at, a in enumerate(order) if a.op in (Op.B, Op.W)]
    expected = gradients if sharding.reduce_each else gradients[-1:]
    for count, at in enumerate(expected):
        reduce = Action(stage, Op.REDUCE, count)
        if order[max(at - 1, 0)] != reduce:
            which = "a" if sharding.reduce_each else "the stage's last"
            yield f"{reduce} must come directly before {order[at]}, {which} weight gradient"
    there = sum(a.op is Op.REDUCE for a in order)
    if there > len(expected):
        yield f"stage {stage} has {there} REDUCEs, but {len(expected)} are asked for"


def _pairing_violations(s: Schedule) -> Iterator[str]:
    """Between two ranks messages carry no names: does the order in which they are received fit?"""
    expected: dict[tuple[int, int], list[Action]] = defaultdict(list)
    posted: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for rank, order in enumerate(s.ranks):
        for a in order:
            if a.op in SENDS:
                expected[rank, s.peer(a)].append(_receive_of(a))
            elif a.op in RECVS:
                posted[s.peer(a), rank].append(a)
    for (source, target), receives in expected.items():
        for k, (want, got) in enumerate(zip(receives, posted[source, target], strict=True)):
            if want != got:
                yield f"message {k} from rank {source} to rank {target} is for {want}, but {got} receives it"
                break


def _play_rendezvous(s: Schedule) -> None:
    """Play the program with sends and receives that each block until the partner is reached as well.

    It was simulated before this: what a rank requires of itself stands before it.
    """
    t = s.table
    found = [t.find(row) for row in needs(t.codes, np.arange(len(t)), t)]
    sends, receives = np.isin(t.op, (SEND_F, SEND_B)), np.isin(t.op, (RECV_F, RECV_B))
    # A receive and what uses it both name their send, if this is lowered; the partner of each message is a position.
    partner = np.full(len(t), -1)
    users = np.flatnonzero(found[3] >= 0)
    partner[found[2][users]], partner[found[3][users]] = found[3][users], found[2][users]
    source = np.where(found[3] >= 0, -1, found[2])  # its receive, earlier in the list, has waited
    kind = np.where(sends, 1, np.where(receives, 2, 0)).tolist()
    pair, waits, home = partner.tolist(), source.tolist(), t.rank.tolist()
    at, last = t.first[:-1].tolist(), t.first[1:].tolist()
    waiting: dict[int, list[int]] = {}
    ready = list(range(s.num_ranks))
    while ready:
        rank = ready.pop()
        while (i := at[rank]) < last[rank]:
            if kind[i]:
                other = home[pair[i]]
                if at[other] != pair[i]:  # the partner comes back for both
                    break
                at[other] += 1
                ready.append(other)
            elif waits[i] >= 0 and at[home[waits[i]]] <= waits[i]:
                waiting.setdefault(home[waits[i]], []).append(rank)
                break
            at[rank] += 1
            if rank in waiting:
                ready += waiting.pop(rank)
    stuck = [Action.of_code(int(t.codes[i])) for i, end in zip(at, last, strict=True) if i < end]
    if stuck:
        raise DeadlockError(stuck, f"deadlock if sends block until received, at {' '.join(map(str, stuck))}")


def _receive_of(send: Action) -> Action:
    """The receive, on the neighbouring stage, that takes what this action sends."""
    if send.op is Op.SEND_F:
        return Action(send.stage + 1, Op.RECV_F, send.mb)
    return Action(send.stage - 1, Op.RECV_B, send.mb)
