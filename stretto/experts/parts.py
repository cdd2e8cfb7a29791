"""The rows of a rank's experts in two parts, whose GEMMs are computed apart: of its own tokens, and of all others'.

Rows that a rank's experts make of its own tokens are in no message. They are computed apart from those of all others,
while messages are under way: the first GEMM while tokens come, the last while outputs leave, and in the backward, which
autograd takes in the opposite order, the same.

    own      rows, gate and up                                        activation, down
    others                      rows, gate and up, activation, down
    message         tokens come                                       outputs leave
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from stretto.experts.dispatch import Dispatch, Message
from stretto.experts.plan import moved
from stretto.experts.segments import Segments


class Part(Protocol):
    """Rows of this rank's experts, by expert, that are computed together."""

    @property
    def segments(self) -> Segments:
        """The rows of each expert."""

    def rows(self, x: Tensor) -> Tensor:
        """Those that the experts take [m, h]; x [n, h] are this rank's tokens."""

    def keep(self, outputs: Tensor) -> None:
        """What the experts make of them, which is to go to their tokens."""

    def gradients(self) -> tuple[Tensor, Tensor]:
        """The weight [m, 1] of each row, and the gradient [m, h] of its token's sum."""

    def back(self, message: Message, rows: Tensor) -> None:
        """Numbers or gradients of the rows go to their tokens."""


class Own:
    """Rows of this rank's own tokens: a `Part`."""

    def __init__(self, dispatch: Dispatch) -> None:
        self._dispatch = dispatch

    @property
    def segments(self) -> Segments:
        return self._dispatch.plan.segments[0]

    def rows(self, x: Tensor) -> Tensor:
        return self._dispatch.own_rows(x)

    def keep(self, outputs: Tensor) -> None:
        self._dispatch.stay("outputs", outputs)

    def gradients(self) -> tuple[Tensor, Tensor]:
        kept, self._dispatch.kept = self._dispatch.kept, None
        assert kept is not None
        return kept

    def back(self, message: Message, rows: Tensor) -> None:
        self._dispatch.stay(message, rows)


class Others:
    """Rows of the tokens of all other ranks: a `Part`."""

    def __init__(self, dispatch: Dispatch) -> None:
        self._dispatch = dispatch
        self._sources: Tensor | None = None
        self._given: tuple[Tensor, Tensor | None] | None = None
        """Outputs, until they go, and the order in which they leave where they lie in another."""

    @property
    def segments(self) -> Segments:
        return self._dispatch.plan.segments[1]

    def rows(self, x: Tensor) -> Tensor:
        del x
        dispatch, plan = self._dispatch, self._dispatch.plan
        tokens, got = plan.tokens, dispatch.handed("tokens")
        assert tokens is not None
        where = dispatch.handed("where")[:, 0]
        if plan.arrange is not None:  # the tokens of each source lie behind those of the sources before
            total = sum(plan.splits.received)
            where = where + torch.repeat_interleave(tokens.before, tokens.sources, output_size=total)
        self._sources = moved(where, plan.arrange)
        return moved(got, self._sources)

    def keep(self, outputs: Tensor) -> None:
        """By expert; or by source, where nobody puts them in that order as they leave."""
        plan = self._dispatch.plan
        engines = plan.exchange.peer_buffer is not None
        self._given = (outputs, plan.restore) if engines else (moved(outputs, plan.restore), None)

    def give(self) -> None:
        """The outputs begin their way back."""
        assert self._given is not None
        self._dispatch.back("outputs", *self._given)
        self._given = None

    def gradients(self) -> tuple[Tensor, Tensor]:
        dispatch, plan = self._dispatch, self._dispatch.plan
        assert self._sources is not None
        return moved(dispatch.taken("shares"), plan.arrange), moved(dispatch.taken("dout"), self._sources)

    def back(self, message: Message, rows: Tensor) -> None:
        self._dispatch.back(message, rows, self._dispatch.plan.restore)
