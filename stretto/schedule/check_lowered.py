"""Is it a program? What `check` asks, and of the messages and the verbs of the weights as well."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stretto.schedule.actions import (
    RECV_B,
    RECV_F,
    REDUCE,
    RESHARD,
    SEND_B,
    SEND_F,
    UNSHARD,
    Action,
    B,
    F,
    I,
    Ints,
    Op,
    W,
    encode,
    mbs_of,
    ops_of,
    stages_of,
)
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
    home, mbs = np.asarray(s.placement), np.arange(s.num_microbatches)
    below = np.flatnonzero(home[:-1] != home[1:])[:, None]
    pairs = ((below, SEND_F), (below + 1, RECV_F), (below + 1, SEND_B), (below, RECV_B))
    needed = np.concatenate([encode(stage, op, mbs).ravel() for stage, op in pairs])
    there = s.table.codes[np.isin(s.table.op, (SEND_F, RECV_F, SEND_B, RECV_B))]
    yield from (f"{a} is missing" for a in _actions(np.setdiff1d(needed, there)))
    yield from (f"{a} is a message that nothing needs" for a in _actions(np.setdiff1d(there, needed)))


def _actions(codes: Ints) -> list[Action]:
    return sorted(map(Action.of_code, codes.tolist()))


def _weight_violations(s: Schedule, sharding: Sharding) -> Iterator[str]:
    """Do the verbs of the weights stand where the executor relies on them?"""
    for stage, rank in enumerate(s.placement):
        codes = s.ranks[rank].codes
        codes = codes[stages_of(codes) == stage]
        if not _weights_are_right(codes, sharding):
            order = [Action.of_code(code) for code in codes.tolist()]
            yield from _visit_violations(stage, order, sharding)
            yield from _reduce_violations(stage, order, sharding)


def _weights_are_right(codes: Ints, sharding: Sharding) -> bool:
    """Whether the two lists of violations that follow are empty for these actions of a stage, without making them."""
    op, number = ops_of(codes), mbs_of(codes)
    opens, ends, reduces = (np.flatnonzero(op == verb) for verb in (UNSHARD, RESHARD, REDUCE))
    whole = np.cumsum(op == UNSHARD) - np.cumsum(op == RESHARD)
    uses = (op == F) | (op == B) | (op == I)
    gradients = np.flatnonzero((op == B) | (op == W))
    expected = gradients if sharding.reduce_each else gradients[-1:]
    return bool(
        np.isin(whole, (0, 1)).all()
        and (whole[uses] == 1).all()
        and all(np.array_equal(number[at], np.arange(len(at))) for at in (opens, ends, reduces))
        and len(ends) == (len(opens) if sharding.params else 0)
        and np.array_equal(reduces, expected - 1)
    )


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
    t, home = s.table, np.asarray(s.placement)
    sent, got = np.isin(t.op, (SEND_F, SEND_B)), np.isin(t.op, (RECV_F, RECV_B))
    forth = np.isin(t.op, (SEND_F, RECV_B))
    other = home[np.clip(t.stage + np.where(forth, 1, -1), 0, s.num_stages - 1)]
    pair = np.where(sent, t.rank * s.num_ranks + other, other * s.num_ranks + t.rank)
    step, receive = np.where(t.op == SEND_F, 1, -1), np.where(t.op == SEND_F, RECV_F, RECV_B)
    wanted = encode(t.stage + np.where(sent, step, 0), np.where(sent, receive, t.op), t.mb)
    # Both in the order of their pair, and within it of their list: the k-th send meets the k-th receive.
    sends, receives = (rows[np.argsort(pair[rows], kind="stable")] for rows in map(np.flatnonzero, (sent, got)))
    wrong = np.flatnonzero(wanted[sends] != wanted[receives])
    for k in wrong[np.unique(pair[sends[wrong]], return_index=True)[1]].tolist():
        source, target = divmod(int(pair[sends[k]]), s.num_ranks)
        number = k - int(np.searchsorted(pair[sends], pair[sends[k]]))
        want, have = (Action.of_code(int(wanted[rows[k]])) for rows in (sends, receives))
        yield f"message {number} from rank {source} to rank {target} is for {want}, but {have} receives it"


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
