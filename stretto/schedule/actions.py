"""The words of the schedule language, and the integers that stand for them in arrays."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Op(StrEnum):
    """The verbs. Computation and messages name a microbatch; the three verbs of the weights name a visit."""

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
    """Begin to gather the stage's parameters, or do nothing if they are whole; the first use is what waits."""
    RESHARD = "RESHARD"
    """Free the stage's gathered parameters; only each rank's own shard stays."""
    REDUCE = "REDUCE"
    """The next B or W of this stage completes a gradient: reduce each bucket as soon as it is ready."""


OPS: Final = tuple(Op)
NUMBER: Final = MappingProxyType({op: number for number, op in enumerate(OPS)})
F, B, I, W, SEND_F, RECV_F, SEND_B, RECV_B, UNSHARD, RESHARD, REDUCE = range(len(OPS))  # noqa: E741
"""The integers of the ops, in arrays."""

COMPUTE: Final = (Op.F, Op.B, Op.I, Op.W)
SENDS: Final = (Op.SEND_F, Op.SEND_B)
RECVS: Final = (Op.RECV_F, Op.RECV_B)
WEIGHTS: Final = (Op.UNSHARD, Op.RESHARD, Op.REDUCE)

_STAGE_BIT: Final = 36
_OP_BIT: Final = 32
_MB_MASK: Final = (1 << _OP_BIT) - 1
_ACTION: Final = re.compile(r"(\d{1,7})([A-Z_]+)(\d{1,9})")


@dataclass(frozen=True, slots=True, order=True)
class Action:
    """One thing that one stage does.

    `mb` is the microbatch. Of UNSHARD and RESHARD it is the visit: parameters are whole in visit 0, 1, ... of the
    stage, each from its UNSHARD to its RESHARD. Of REDUCE it counts the stage's reductions in the step.
    """

    stage: int
    op: Op
    mb: int = 0

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{self.mb}"

    @property
    def code(self) -> int:
        """The action as one integer; they sort by stage, op and microbatch."""
        return self.stage << _STAGE_BIT | NUMBER[self.op] << _OP_BIT | self.mb

    @classmethod
    def of_code(cls, code: int) -> Action:
        """The action with this code."""
        return cls(code >> _STAGE_BIT, OPS[code >> _OP_BIT & 15], code & _MB_MASK)

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action that prints as `text`, such as `2F0` or `1REDUCE0`; `ValueError` for any other text."""
        match = _ACTION.fullmatch(text)
        if match is None or match[2] not in Op.__members__:
            raise ValueError(
                f"{text!r} is not an action: expected stage, op and microbatch such as 2F0 or 1SEND_B3, "
                f"or stage, op and visit such as 0UNSHARD0; the ops are {' '.join(Op)}"
            )
        return cls(int(match[1]), Op(match[2]), int(match[3]))


def encode(stage: Ints | int, op: Ints | int, mb: Ints | int) -> Ints:
    """Codes from columns of stages, numbers of ops and microbatches, broadcast against each other."""
    return np.asarray(stage, np.int64) << _STAGE_BIT | np.asarray(op, np.int64) << _OP_BIT | np.asarray(mb, np.int64)


def stages_of(codes: Ints) -> Ints:
    """The column of stages."""
    return codes >> _STAGE_BIT


def ops_of(codes: Ints) -> Ints:
    """The column of the numbers of ops."""
    return codes >> _OP_BIT & 15


def mbs_of(codes: Ints) -> Ints:
    """The column of microbatches or visits."""
    return codes & _MB_MASK
