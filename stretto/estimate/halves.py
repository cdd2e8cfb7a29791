"""What lives of the two halves of a microbatch that take turns in a block, as `stretto.models.halves` has them do.

Each has tensors of its own; at any time one computes, and the other lives on as it was left.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from stretto.estimate.tape import Moment, Stretch, Tape

FORWARD: Final = ((0, 0, 1), (1, 0), (0, 2), (1, 1), (0, 3), (1, 2), (0, 4), (1, 3, 4))
"""A half, and the stretches through which it goes before it is left. What follows the last stop comes in the next
block, before all else of this half."""
BACKWARD: Final = ((1, 1, 2), (0, 1), (1, 3), (0, 2, 3), (1, 4), (0, 4))
"""The same; the first comes behind the last of the block that follows."""


def one_by_one(forward: Tape, kept: int, backward: Tape) -> tuple[Moment, Moment]:
    """The most that lives forward and back, of tapes of one half, which keeps so much."""
    leaves = forward.now - kept
    ahead, back = Stretch(forward.most, forward.now), Stretch(backward.most, backward.now)
    return _most([(0, ahead), (1, ahead)], [leaves] * 2), _most([(1, back), (0, back)], [forward.now] * 2)


def in_turns(forward: Tape, kept: int, backward: Tape, *, alone: bool) -> tuple[Moment, Moment]:
    """The same where both are left while they send.

    Unless the block is `alone`, outputs of the one before it are still on their way when it begins, forward, and
    gradients of its outputs already when it ends, backward.
    """
    ahead, back = forward.stretches, backward.stretches
    enters = forward.now - kept if alone else ahead[-2].left - kept
    return (
        _most(_forward(ahead, kept, alone=alone), [enters] * 2),
        _most(_backward(back, kept, alone=alone), [forward.now] * 2),
    )


def _forward(stretches: list[Stretch], kept: int, *, alone: bool) -> Iterator[tuple[int, Stretch]]:
    for half, *which in FORWARD:
        if not alone and 0 in which:
            yield half, stretches[-1].without(kept)
        yield from ((half, stretches[n]) for n in which)
    yield from ((half, stretches[-1]) for half in (0, 1))


def _backward(stretches: list[Stretch], kept: int, *, alone: bool) -> Iterator[tuple[int, Stretch]]:
    yield from ((half, stretches[0]) for half in (1, 0))
    for half, *which in BACKWARD:
        yield from ((half, stretches[n]) for n in which)
        if not alone and 4 in which:
            yield half, stretches[0].without(kept)


def _most(turns: Iterable[tuple[int, Stretch]], levels: list[int]) -> Moment:
    """While a half goes on, the other is where it was left; `levels` are those at the start."""
    found = Moment("", sum(levels))
    for half, stretch in turns:
        if (now := stretch.most.bytes + levels[1 - half]) > found.bytes:
            found = Moment(stretch.most.name, now)
        levels[half] = stretch.left
    return found
