"""One communication of one rank, and the place in the program that asked for it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import CodeType, FrameType

# Modules that only pass a communication on: who asked for it is further up the stack.
_PASSING = (
    "torch.",
    "contextlib",
    "stretto.collective_trace",
    "stretto.collectives",
    "stretto.ordered",
    "stretto.world",
    "stretto.parallel_state",
    "stretto.tensor_parallel.mappings",
    "stretto.pipeline_parallel.link",
)


@dataclass(frozen=True, slots=True)
class CollectiveCall:
    """A collective, or one end of a message, in the order in which this rank came to it.

    `channel` is what has an order of its own: a process group, or for messages a pair of its ranks in one direction.
    `ranks` are those of the layout that take part, `number` counts the calls on the channel from 0.
    """

    axis: str
    channel: str
    ranks: tuple[int, ...]
    number: int
    op: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    """Of the tensor that this rank puts in; for a receive, of what it waits for; of rows, those that leave it."""
    site: str
    """FILE:LINE of the first caller that is not one of the modules that pass communications on.

    In a backward that is who called it, and in brackets follows the autograd function whose backward communicates.
    """

    @property
    def signature(self) -> tuple[str, tuple[int, ...], str]:
        """What all ranks of the channel must agree on; the two ends of a message are one operation.

        Of rows that go to several ranks each sends as many as it has.
        """
        shape = self.shape[1:] if self.op == "all_to_all_rows" else self.shape
        return ("message" if self.op in ("send", "recv") else self.op, shape, self.dtype)

    @property
    def wire_bytes(self) -> float:
        """Bytes that this rank must at least send, by the textbook (Thakur et al., 2005; rings): x is `bytes`.

        all_reduce 2(n-1)/n x, all_gather (n-1) x, reduce_scatter and all_to_all (n-1)/n x, send, shift and
        all_to_all_rows x, recv 0;
        broadcast x(n-1)/n, the mean over the ranks of a chain.
        """
        n = len(self.ranks)
        share = (n - 1) / n
        factors = {"all_gather": n - 1.0, "reduce_scatter": share, "all_to_all": share, "broadcast": share}
        factors |= {
            "all_reduce": 2 * share,
            "all_reduce_max": 2 * share,
            "send": 1.0,
            "shift": 1.0,
            "all_to_all_rows": 1.0,
        }
        return factors.get(self.op.partition(" ")[0], 0.0) * self.bytes


def passes_on(frame: FrameType) -> bool:
    """Whether a frame only passes a communication on."""
    return frame.f_globals.get("__name__", "").startswith(_PASSING)  # type: ignore[no-any-return]


def caller() -> tuple[CodeType | None, int, CodeType | None]:
    """The code and the line that asked for the communication which is about to be issued, and the backward of an
    autograd function through which it did."""
    frame: FrameType | None = sys._getframe(1)
    backward: CodeType | None = None
    while frame is not None and passes_on(frame):
        if frame.f_code.co_name == "backward" and frame.f_globals["__name__"].startswith("stretto."):
            backward = frame.f_code
        frame = frame.f_back
    return (None, 0, backward) if frame is None else (frame.f_code, frame.f_lineno, backward)


def site(code: CodeType | None, line: int, backward: CodeType | None) -> str:
    """FILE:LINE, or FILE:LINE (FUNCTION.backward)."""
    # A thread of autograd's own, as for each GPU, has no other frames.
    place = "a backward" if code is None else f"{code.co_filename}:{line}"
    return f"{place} ({backward.co_qualname})" if backward else place


def encode(calls: Sequence[CollectiveCall]) -> str:
    """As text for a store."""
    return json.dumps([asdict(call) for call in calls])


def decode(text: bytes) -> list[CollectiveCall]:
    """The calls of such a text."""
    return [CollectiveCall(**{**c, "ranks": tuple(c["ranks"]), "shape": tuple(c["shape"])}) for c in json.loads(text)]
