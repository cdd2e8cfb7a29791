"""The schedule language: what a rank may do, and what must have happened before it may.

A pipeline cuts the model into *stages*, placed on *ranks*; a batch is cut into *microbatches*. One word of
the language, an `Action`, says that a stage does one thing with one microbatch: `2F0` is the forward of
microbatch 0 through stage 2. A `Schedule` is one list of actions per rank and nothing else: no times, no
modules, no tensors. It can be printed, compared, drawn, simulated and executed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property


class Op(StrEnum):
    """The verbs. Computation and messages name a microbatch; the three verbs of the weights name none."""

    F = "F"
    """Forward: waits for the input of the stage, keeps what the backward needs."""
    B = "B"
    """Whole backward: waits for the gradient of the output; gives both gradients below at once."""
    I = "I"  # noqa: E741 (the established name of this op)
    """Backward for the input alone: all that the stage below waits for."""
    W = "W"
    """Backward for the weights alone: may run any time after the I of its microbatch; frees activations."""
    SEND_F = "SEND_F"
    """Begin to send the stage's output to the rank of the next stage; does not wait for delivery."""
    RECV_F = "RECV_F"
    """Post the receive of the stage's input; the F that uses it is what waits."""
    SEND_B = "SEND_B"
    """Begin to send the gradient of the stage's input to the rank of the previous stage."""
    RECV_B = "RECV_B"
    """Post the receive of the gradient of the stage's output; the B or I that uses it is what waits."""
    UNSHARD = "UNSHARD"
    """Begin to make the stage's parameters whole, or do nothing if they are; its first F is what waits."""
    RESHARD = "RESHARD"
    """Let go of the stage's whole parameters; only each rank's own shard stays."""
    REDUCE = "REDUCE"
    """The next weight gradient of this stage is the step's last: reduce each bucket as soon as it is full."""


COMPUTE = (Op.F, Op.B, Op.I, Op.W)
SENDS = (Op.SEND_F, Op.SEND_B)
RECVS = (Op.RECV_F, Op.RECV_B)
WEIGHTS = (Op.UNSHARD, Op.RESHARD, Op.REDUCE)

_ACTION = re.compile(r"(\d+)([A-Z_]+)(\d*)")


class ScheduleError(ValueError):
    """A schedule or program that cannot be run; the message lists every reason found."""


@dataclass(frozen=True, slots=True, order=True)
class Action:
    """One thing that one stage does. `mb` is the microbatch, -1 where the verb has none."""

    stage: int
    op: Op
    mb: int = -1

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{self.mb if self.mb >= 0 else ''}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action that prints as `text`, such as `2F0` or `1REDUCE`; `ValueError` for any other text."""
        match = _ACTION.fullmatch(text)
        if match is None or match[2] not in Op.__members__ or (Op(match[2]) in WEIGHTS) != (match[3] == ""):
            raise ValueError(
                f"{text!r} is not an action: expected stage, op and microbatch such as 2F0 or 1SEND_B3, "
                f"or stage and op such as 0REDUCE; the ops are {' '.join(Op)}"
            )
        return cls(int(match[1]), Op(match[2]), int(match[3] or -1))


@dataclass(frozen=True)
class Schedule:
    """What every rank of a pipeline does in one step, in order.

    `placement[stage]` is the pipeline rank that holds the stage, so a loop, a V or anything else is data;
    `ranks[r]` are the actions of rank r. The value may be wrong in every way: `check` says whether it is.
    """

    placement: tuple[int, ...]
    num_microbatches: int
    ranks: tuple[tuple[Action, ...], ...]

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return len(self.placement)

    @property
    def num_ranks(self) -> int:
        """Ranks of the pipeline."""
        return len(self.ranks)

    @cached_property
    def actions(self) -> frozenset[Action]:
        """Every action of every rank."""
        return frozenset(action for rank in self.ranks for action in rank)

    def crosses(self, stage: int, other: int) -> bool:
        """Whether what passes from one of these stages to the other needs a message."""
        return self.placement[stage] != self.placement[other]

    def peer(self, message: Action) -> int:
        """The rank at the other end of a send or receive."""
        up = message.op in (Op.SEND_F, Op.RECV_B)
        return self.placement[message.stage + (1 if up else -1)]

    def __str__(self) -> str:
        return "\n".join(" ".join(map(str, rank)) for rank in self.ranks)

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """The schedule that prints as `text`: one line per rank, actions between spaces.

        Where each stage lies and how many microbatches there are is read off the actions. Raises
        `ScheduleError` when a stage shows up on two ranks, or on none.
        """
        ranks = tuple(tuple(map(Action.parse, line.split())) for line in text.strip().splitlines())
        homes: dict[int, set[int]] = {}
        for rank, actions in enumerate(ranks):
            for action in actions:
                homes.setdefault(action.stage, set()).add(rank)
        for stage in range(max(homes, default=0) + 1):
            if len(homes.get(stage, ())) != 1:
                found = ", ".join(map(str, sorted(homes.get(stage, ())))) or "none"
                raise ScheduleError(f"stage {stage} must lie on one rank, found on: {found}")
        microbatches = 1 + max(action.mb for actions in ranks for action in actions)
        placement = tuple(min(homes[stage]) for stage in range(len(homes)))
        return cls(placement, microbatches, ranks)


def input_gradient(s: Schedule, stage: int, mb: int) -> Action:
    """The action that yields the gradient of the stage's input: I where this backward is split, else B."""
    split = Action(stage, Op.I, mb)
    return split if split in s.actions else Action(stage, Op.B, mb)


def requires(a: Action, s: Schedule) -> list[Action]:
    """The actions that must have finished before `a` may run. The only statement of this rule.

    It covers schedules as generated, where an activation simply is on the next rank, and lowered programs,
    where it must have been sent and a receive must have been posted.
    """
    match a.op:
        case Op.F:
            source = [] if a.stage == 0 else _arrival(a, Action(a.stage - 1, Op.F, a.mb), s)
            return [*_if_present(Action(a.stage, Op.UNSHARD), s), *source]
        case Op.B | Op.I:
            last = a.stage == s.num_stages - 1
            source = [] if last else _arrival(a, input_gradient(s, a.stage + 1, a.mb), s)
            return [Action(a.stage, Op.F, a.mb), *source]
        case Op.W:
            return [Action(a.stage, Op.I, a.mb)]
        case Op.SEND_F:
            return [Action(a.stage, Op.F, a.mb)]
        case Op.SEND_B:
            return [input_gradient(s, a.stage, a.mb)]
        case Op.RECV_F | Op.RECV_B | Op.UNSHARD | Op.RESHARD | Op.REDUCE:
            return []


def _arrival(a: Action, producer: Action, s: Schedule) -> list[Action]:
    """What brings the producer's result to `a`: the producer alone, or its message once there is one."""
    way = "F" if a.op is Op.F else "B"
    posted = Action(a.stage, Op(f"RECV_{way}"), a.mb)
    return [Action(producer.stage, Op(f"SEND_{way}"), a.mb), posted] if posted in s.actions else [producer]


def _if_present(a: Action, s: Schedule) -> list[Action]:
    return [a] if a in s.actions else []
