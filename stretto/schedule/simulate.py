"""Play a schedule against a clock, without a device: when does each action run, and what is left idle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stretto.schedule.ir import Action, Op, Schedule, ScheduleError, requires


@dataclass(frozen=True, slots=True)
class Span:
    """One action in time: it keeps its rank busy from `start` to `end`."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Cost:
    """How long things take, in any one unit of time.

    The default is the textbook's: a backward is two forwards, its halves one each, messages are free.
    `stages[s]`, if given, multiplies the computation of stage s (its number of layers, say). `hop` is the
    time from the end of a producer on one rank to the start of its consumer on another.
    """

    forward: float = 1.0
    backward: float = 2.0
    input_gradient: float = 1.0
    weight_gradient: float = 1.0
    hop: float = 0.0
    stages: tuple[float, ...] = ()

    def time(self, a: Action) -> float:
        """How long the action keeps its rank busy: messages and the verbs of the weights do not."""
        scale = self.stages[a.stage] if self.stages else 1.0
        match a.op:
            case Op.F:
                return scale * self.forward
            case Op.B:
                return scale * self.backward
            case Op.I:
                return scale * self.input_gradient
            case Op.W:
                return scale * self.weight_gradient
            case _:
                return 0.0


class DeadlockError(ScheduleError):
    """No rank can go on. `blocked` are the actions at which ranks stand."""

    def __init__(self, blocked: Sequence[Action], message: str) -> None:
        super().__init__(message)
        self.blocked = tuple(blocked)


def simulate(s: Schedule, cost: Cost | None = None) -> list[Span]:
    """When every action runs if each rank does its list in order, each action as early as `requires` lets it.

    The spans come in an order in which they could happen one after another. Raises `DeadlockError`, naming
    for every rank that is stuck its next action and what that waits for.
    """
    cost = cost or Cost()
    finished: dict[Action, Span] = {}
    clock = [0.0] * s.num_ranks
    position = [0] * s.num_ranks

    def advance(rank: int, a: Action) -> bool:
        needs = requires(a, s)
        if any(need not in finished for need in needs):
            return False
        sources = [finished[need] for need in needs]
        arrivals = [source.end + (cost.hop if source.rank != rank else 0.0) for source in sources]
        start = max([clock[rank], *arrivals])
        clock[rank] = start + cost.time(a)
        finished[a] = Span(rank, a, start, clock[rank])
        return True

    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(s.ranks):
            while position[rank] < len(order) and advance(rank, order[position[rank]]):
                position[rank] += 1
                moved = True
    stuck = [order[at] for order, at in zip(s.ranks, position, strict=True) if at < len(order)]
    if stuck:
        waits = ((a, [need for need in requires(a, s) if need not in finished]) for a in stuck)
        raise DeadlockError(
            stuck, "deadlock: " + "; ".join(f"{a} waits for {' '.join(map(str, needs))}" for a, needs in waits)
        )
    return list(finished.values())


def makespan(spans: Sequence[Span]) -> float:
    """When the last action ends."""
    return max(span.end for span in spans)


def bubble(spans: Sequence[Span]) -> float:
    """The part of all ranks' time that they idle, until the last action of any ends: 0 to 1."""
    ranks = 1 + max(span.rank for span in spans)
    busy = sum(span.end - span.start for span in spans)
    return 1 - busy / (ranks * makespan(spans))


def peak_live(spans: Sequence[Span]) -> tuple[int, ...]:
    """For each rank, the most activations (of one stage and one microbatch each) that it holds at once.

    An activation lives from its F to the end of its B, or of its W where the backward is split.
    """
    live = [0] * (1 + max(span.rank for span in spans))
    peak = list(live)
    for span in spans:
        live[span.rank] += {Op.F: 1, Op.B: -1, Op.W: -1}.get(span.action.op, 0)
        peak[span.rank] = max(peak[span.rank], live[span.rank])
    return tuple(peak)
