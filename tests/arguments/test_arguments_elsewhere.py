"""Any run that the rules accept is one in its own layout, and on one process: `stretto verify` compares the two.

Faults to catch: an end of a decay for a rate that is constant; time-outs of groups that a layout does not have.
"""

from __future__ import annotations

import pytest
from any_settings import any_run
from hypothesis import given
from hypothesis import strategies as st

from stretto.arguments import parse
from stretto.arguments.elsewhere import validated_in
from stretto.layout import Layout

pytestmark = pytest.mark.pure


@given(seed=st.integers(0, 2**32))
def test_any_run_may_be_moved_to_one_process_or_nowhere(seed: int) -> None:
    """Red where what was derived has no effect there, such as a decay of a constant rate, or time-outs of no group."""
    _, run = any_run(seed, most_ranks=64)
    assert validated_in(run.args, run.layout).layout == run.layout
    alone = validated_in(run.args, Layout.of())
    assert (alone.layout.world, alone.args.model) == (1, run.args.model)


def test_a_constant_rate_and_the_time_out_of_a_group_move() -> None:
    """Both were rejected as settings of the reference that nobody had said."""
    words = "--preset tiny --lr-schedule constant --dp 2 --timeouts dp=30,dp-cp=40"
    run = parse(words.split(), env={}, files=False)
    assert run.args.optimizer.decay_steps is None
    moved = validated_in(run.args, Layout.of(tp=2)).args
    assert moved.groups.timeouts == ()
    assert validated_in(run.args, Layout.of(dp=2, tp=2)).args.groups == run.args.groups
