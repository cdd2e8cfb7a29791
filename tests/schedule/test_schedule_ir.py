"""The language: its text form, and the one rule of what must come before what."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedule_strategies import any_schedule

from stretto.schedule import Action, Op, Schedule, ScheduleError, lower, one_f_one_b, requires

pytestmark = pytest.mark.pure

ACTIONS = st.builds(
    Action,
    st.integers(0, 999),
    st.sampled_from(Op),
    st.integers(0, 9999),
)


@given(ACTIONS)
def test_an_action_survives_its_text(action: Action) -> None:
    assert Action.parse(str(action)) == action


@given(any_schedule())
def test_a_schedule_and_its_program_survive_their_text(s: Schedule) -> None:
    assert Schedule.parse(str(s)) == s
    assert Schedule.parse(str(lower(s))) == lower(s)


@pytest.mark.parametrize("text", ["", "F0", "2F", "2X0", "2F-1", "0REDUCE", "2f0", "2F0 ", "0SEND_B"])
def test_other_text_is_rejected_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not an action: expected .* 2F0"):
        Action.parse(text)


def test_parse_says_where_a_stage_was_found() -> None:
    with pytest.raises(ScheduleError, match="stage 1 must lie on one rank, found on: 0, 1"):
        Schedule.parse("0F0 1F0 0B0\n1B0")
    with pytest.raises(ScheduleError, match="stage 1 must lie on one rank, found on: none"):
        Schedule.parse("0F0 2F0")
    with pytest.raises(ScheduleError, match="stage 0 must lie on one rank, found on: none"):
        Schedule.parse("")


def needs(text: str, s: Schedule) -> str:
    return " ".join(map(str, requires(Action.parse(text), s)))


def test_what_a_schedule_requires() -> None:
    whole = one_f_one_b(3, 2)
    assert needs("0F1", whole) == ""
    assert needs("1F1", whole) == "0F1"
    assert needs("1B1", whole) == "1F1 2B1"
    assert needs("2B1", whole) == "2F1"
    split = Schedule.parse("0F0 0I0 0W0\n1F0 1I0 1W0")
    assert needs("0I0", split) == "0F0 1I0"
    assert needs("0W0", split) == "0I0"
    mixed = Schedule.parse("0F0 0B0\n1F0 1I0 1W0")
    assert needs("0B0", mixed) == "0F0 1I0"  # only the half that gives what is waited for


def test_what_a_program_requires() -> None:
    program = lower(one_f_one_b(3, 2))
    assert needs("0F1", program) == "0UNSHARD0"
    assert needs("1F1", program) == "1UNSHARD0 0SEND_F1 1RECV_F1"
    assert needs("1B1", program) == "1UNSHARD0 1F1 2SEND_B1 1RECV_B1"
    assert needs("1SEND_F1", program) == "1F1"
    assert needs("1SEND_B1", program) == "1B1"
    assert needs("1RECV_F1", program) == ""


def test_peer_is_the_other_end() -> None:
    v_shape = Schedule((0, 1, 1, 0), 1, ((), ()))
    assert v_shape.crosses(0, 1)
    assert not v_shape.crosses(1, 2)
    assert [v_shape.peer(Action.parse(a)) for a in ("0SEND_F0", "1RECV_F0", "3SEND_B0", "2RECV_B0")] == [1, 0, 1, 0]


def test_the_room_does_not_import_torch() -> None:
    code = "import stretto.schedule, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
