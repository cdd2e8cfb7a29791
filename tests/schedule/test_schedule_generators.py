"""GPipe and 1F1B: their textbook figures, and the order that a well-known trainer runs."""

import json
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedule_strategies import GENERATED

from stretto.arguments.schema import ParallelConfig
from stretto.schedule import (
    GENERATORS,
    Action,
    Op,
    Schedule,
    bubble,
    check,
    draw,
    gpipe,
    one_f_one_b,
    peak_live,
    schedule_for,
    simulate,
)

pytestmark = pytest.mark.pure

SIZES = {"p": st.integers(1, 8), "m": st.integers(1, 16)}
RECORDED = json.loads((Path(__file__).parent.parent / "data" / "one_f_one_b_orders.json").read_text())["cases"]


def test_reads_like_the_paper() -> None:
    assert draw(one_f_one_b(2, 3)) == "0F0 0F1 0B0 0F2 0B1 0B2\n1F0 1B0 1F1 1B1 1F2 1B2"
    assert draw(gpipe(2, 2)) == "0F0 0F1 0B0 0B1\n1F0 1F1 1B0 1B1"


@given(**SIZES)
def test_bubble_is_the_textbook_one(p: int, m: int) -> None:
    # Narayanan et al. 2021, section 2.2: bubble over ideal time is (p-1)/m for both, so over all time:
    for s in (gpipe(p, m), one_f_one_b(p, m)):
        assert bubble(simulate(s)) == pytest.approx((p - 1) / (m + p - 1))


@given(**SIZES)
def test_activations_held_are_the_textbook_ones(p: int, m: int) -> None:
    assert peak_live(simulate(gpipe(p, m))) == (m,) * p
    assert peak_live(simulate(one_f_one_b(p, m))) == tuple(min(p - rank, m) for rank in range(p))


@given(GENERATED)
def test_every_forward_and_backward_is_there_once(s: Schedule) -> None:
    check(s)
    for stage, order in enumerate(s.ranks):
        assert sorted(order) == sorted(Action(stage, op, mb) for op in (Op.F, Op.B) for mb in range(s.num_microbatches))


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: f"pp{case['pp']}-m{case['num_microbatches']}")
def test_1f1b_is_the_order_a_peer_runs(case: dict) -> None:  # type: ignore[type-arg]
    s = one_f_one_b(case["pp"], case["num_microbatches"])
    for stage, (ours, theirs) in enumerate(zip(s.ranks, case["ranks"], strict=True)):
        assert [f"{a.op}{a.stage - stage}.{a.mb}" for a in ours] == theirs["order"]
        first_backward = next(at for at, a in enumerate(ours) if a.op is Op.B)
        # The peer does not count the forward that the first backward directly follows, unless all are warm-up.
        assert first_backward == min(theirs["warmup"] + 1, s.num_microbatches)


def test_names() -> None:
    assert schedule_for("1f1b", 3, 4) == one_f_one_b(3, 4)
    assert schedule_for("gpipe", 3, 4) == gpipe(3, 4)
    assert set(GENERATORS) == set(get_args(get_type_hints(ParallelConfig)["schedule"]))
    with pytest.raises(ValueError, match="no schedule is named 'zigzag'; there are: 1f1b, gpipe"):
        schedule_for("zigzag", 2, 2)


@pytest.mark.parametrize(("p", "m"), [(0, 1), (1, 0), (-1, 4)])
@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_sizes_must_be_positive(name: str, p: int, m: int) -> None:
    with pytest.raises(ValueError, match=f"{p} ranks and {m} microbatches: both must be at least 1"):
        schedule_for(name, p, m)
