"""Is it a program? What `check` asks, and of the messages and the verbs of the weights as well."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from stretto.schedule.check import (
    address_violations,
    completeness_violations,
    placement_violations,
    refuse,
)
from stretto.schedule.ir import RECVS, SENDS, Action, Op, Schedule, requires
from stretto.schedule.sharding import DDP, Sharding
from stretto.schedule.simulate import DeadlockError, simulate


def check_lowered(s: Schedule, sharding: Sharding = DDP) -> None:
    """Raise `ScheduleError` unless `s` is a program that an executor can run under this sharding.

    Beyond `check`: each activation and gradient that changes ranks is sent once and received once; the k-th
    send from a to b is what the k-th receive of b from a expects; no rank waits for ever (`DeadlockError`),
    not even if each send blocked until its receive is reached and the other way round; and UNSHARD, REDUCE
    and RESHARD stand where `lower` says they do.
    """
    refuse(placement_violations(s))
    refuse(
        [
            *address_violations(s, tuple(Op)),
            *completeness_violations(s),
            *_message_violations(s),
            *_weight_violations(s, sharding),
        ]
    )
    refuse(list(_pairing_violations(s)))
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
        order = [a for a in s.ranks[s.placement[stage]] if a.stage == stage]
        unshard, reshard, reduce = (Action(stage, op) for op in (Op.UNSHARD, Op.RESHARD, Op.REDUCE))
        if order[:1] != [unshard]:
            yield f"{unshard} must come before all else of stage {stage}"
        if sharding.params and order[-1:] != [reshard]:
            yield f"{reshard} must come after all else of stage {stage}"
        if not sharding.params and reshard in order:
            yield f"{reshard} is there, but the parameters are not sharded"
        gradients = [at for at, a in enumerate(order) if a.op in (Op.B, Op.W)]
        if gradients and order[max(gradients[-1] - 1, 0)] != reduce:
            yield f"{reduce} must come directly before {order[gradients[-1]]}, the stage's last weight gradient"


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
    """Play the program with sends and receives that each block until the partner is reached as well."""
    position = [0] * s.num_ranks
    done: set[Action] = set()

    def head(rank: int) -> Action | None:
        order = s.ranks[rank]
        return order[position[rank]] if position[rank] < len(order) else None

    def finish(rank: int, a: Action) -> None:
        done.add(a)
        position[rank] += 1

    def advance(rank: int, a: Action) -> bool:
        if a.op in RECVS:  # its sender takes both along
            return False
        if a.op in SENDS:
            receive = _receive_of(a)
            if head(s.peer(a)) != receive:
                return False
            finish(s.peer(a), receive)
        elif any(need not in done for need in requires(a, s)):
            return False
        finish(rank, a)
        return True

    moved = True
    while moved:
        moved = False
        for rank in range(s.num_ranks):
            while (a := head(rank)) is not None and advance(rank, a):
                moved = True
    stuck = [a for rank in range(s.num_ranks) if (a := head(rank)) is not None]
    if stuck:
        raise DeadlockError(stuck, f"deadlock if sends block until received, at {' '.join(map(str, stuck))}")


def _receive_of(send: Action) -> Action:
    """The receive, on the neighbouring stage, that takes what this action sends."""
    if send.op is Op.SEND_F:
        return Action(send.stage + 1, Op.RECV_F, send.mb)
    return Action(send.stage - 1, Op.RECV_B, send.mb)
