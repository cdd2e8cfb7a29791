"""Pictures: exact ones to look at, and invariants for sizes nobody looks at."""

import doctest
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedule_strategies import GENERATED, any_schedule

from stretto.schedule import Cost, Schedule, draw, gantt, makespan, one_f_one_b, simulate

pytestmark = pytest.mark.pure


@given(any_schedule())
def test_draw_is_read_back(s: Schedule) -> None:
    assert Schedule.parse(draw(s)) == s


def test_gantt_of_1f1b() -> None:
    assert gantt(simulate(one_f_one_b(2, 3))).splitlines() == [
        "        0     2     4     6     8     10    12",
        "rank 0  ░0░░1░      ▓▓0▓▓▓░2░▓▓1▓▓▓   ▓▓2▓▓▓",
        "rank 1     ░0░▓▓0▓▓▓░1░▓▓1▓▓▓░2░▓▓2▓▓▓",
        "        ░ forward   ▓ backward   time 12   bubble 25.0%   peak activations 2 1",
    ]


def test_gantt_of_split_backwards_on_a_v() -> None:
    v_shape = Schedule.parse("0F0 3F0 3I0 0I0 3W0 0W0\n1F0 2F0 2I0 1I0 2W0 1W0")
    assert gantt(simulate(v_shape)).splitlines() == [
        "        0         2         4         6         8         10",
        "rank 0  ░0:0░          ░3:0░▓3:0▓          ▓0:0▓▒3:0▒▒0:0▒",
        "rank 1       ░1:0░░2:0░          ▓2:0▓▓1:0▓▒2:0▒▒1:0▒",
        "        ░ forward   ▓ input gradient   ▒ weight gradient   time 10   bubble 40.0%   peak activations 2 2",
    ]


def test_labels_that_hide_their_block_are_left_out() -> None:
    narrow = gantt(simulate(one_f_one_b(1, 11)), width=8 + 33).splitlines()[1]
    assert narrow == "rank 0  " + "".join(f"░{mb}▓" if mb < 10 else "░▓▓" for mb in range(11))


def test_equal_actions_are_equally_long_where_columns_are_scarce() -> None:
    row = gantt(simulate(one_f_one_b(1, 4)), width=8 + 35).splitlines()[1]  # 2.9 columns per unit would fit
    assert row == "rank 0  " + "".join(f"{mb}░▓{mb}▓▓" for mb in range(4))


@given(GENERATED | any_schedule(), st.floats(0.01, 100), st.floats(0.01, 100), st.integers(20, 200))
def test_gantt_keeps_to_its_width(s: Schedule, forward: float, backward: float, width: int) -> None:
    spans = simulate(s, Cost(forward, backward, forward, backward))
    _, *rows, _ = gantt(spans, width=width).splitlines()
    assert len(rows) == s.num_ranks
    assert max(map(len, rows)) <= width


@given(GENERATED)
def test_gantt_shows_all_the_ink_there_is(s: Schedule) -> None:
    """At a whole number of columns per unit: as many columns as busy units, per rank."""
    _, *rows, _ = gantt(simulate(s), width=500).splitlines()
    stages = s.num_stages // s.num_ranks
    per_unit = 2 + max(len(f"{a.stage}:{a.mb}" if stages > 1 else f"{a.mb}") for a in s.actions)
    for row in rows:
        busy = re.sub(r"^rank \d+", "", row).replace(" ", "")
        assert len(busy) == 3 * s.num_microbatches * stages * per_unit
    assert max(map(len, rows)) == len("rank 0  ") + makespan(simulate(s)) * per_unit


def test_the_page_shows_what_the_code_prints() -> None:
    page = Path(__file__).parents[2] / "docs" / "schedules.md"
    result = doctest.testfile(str(page), module_relative=False)
    assert result.attempted > 5
    assert result.failed == 0
