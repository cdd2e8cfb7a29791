"""Halves of a microbatch take turns in the ledger as they do in the model; at any time one is where it was left.

Faults to catch: a stop of one half moved; the other half forgotten at a peak; outputs that are still on their way when
the next block begins left out.
"""

from __future__ import annotations

import pytest

from stretto.estimate.halves import FORWARD, in_turns
from stretto.estimate.tape import Tape
from stretto.experts.run import Stop
from stretto.models.halves import STOPS

pytestmark = pytest.mark.gloo


def test_halves_take_turns_as_in_the_model() -> None:
    """Of each, the stretches up to its first stop, then to the next; the last one comes in the block that follows."""
    at, turns = [0, 0], []
    for n in range(len(STOPS[0])):
        for half, stops in enumerate(STOPS):
            here = list(Stop).index([stop for stop in Stop if stop in stops][n]) + 1
            turns.append((half, *range(at[half], here)))
            at[half] = here
    assert tuple(turns) == FORWARD


def tapes() -> tuple[Tape, int, Tape]:
    """Of a half of which 10 enter: forward 2 while it is left, 100 before its third stop, 7 as it is through."""
    forward = Tape(x=10)
    forward.make(sent=2)
    forward.leave()
    forward.leave()
    forward.leave()
    forward.free("sent")
    forward.make(large=100)
    forward.free("large")
    forward.leave()
    forward.make(coming=7)
    forward.leave()
    forward.free("coming")
    forward.make(out=10)
    backward = Tape(x=10, dout=10)
    backward.make(dcoming=5)
    backward.leave()
    backward.make(large=200)
    backward.free("large", "dcoming")
    backward.leave()
    backward.leave()
    backward.leave()
    backward.make(dx=10)
    backward.free("dout", "x")
    return forward, 10, backward


def test_a_peak_has_the_other_half_where_it_was_left() -> None:
    forward, kept, backward = tapes()
    alone = in_turns(forward, kept, backward, alone=True)
    # The second is at its peak while outputs of the first are on their way; back, the first while those of neither are.
    assert [each.bytes for each in alone] == [(10 + 7) + (10 + 100), (10 + 10 + 5) + (10 + 10 + 5 + 200)]


def test_what_comes_from_the_block_before_counts() -> None:
    forward, backward = Tape(x=10), Tape(x=10, dout=10)
    forward.make(attending=50)
    forward.free("attending")
    for _ in range(4):
        forward.leave()
    forward.make(coming=15)
    forward.leave()
    forward.make(out=10)
    forward.free("coming")
    for _ in range(4):
        backward.leave()
    first, later = (in_turns(forward, 10, backward, alone=alone)[0].bytes for alone in (True, False))
    assert first == (10 + 50) + 10
    assert later == (10 + 50) + 15
