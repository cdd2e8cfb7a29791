"""PyTorch's tables in and out; the grid of an error; the trace."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from schedule_strategies import GENERATED, any_schedule

from stretto.schedule import Action, Schedule, ScheduleError, check, one_f_one_b, schedule_for, simulate
from stretto.schedule.csv import from_csv, to_csv
from stretto.schedule.grid import failing, grid
from stretto.schedule.picture import chrome_trace, picture

pytestmark = pytest.mark.pure


@given(GENERATED | any_schedule())
def test_a_table_reads_back(s: Schedule) -> None:
    assert from_csv(to_csv(s)) == s


def test_what_torch_writes_is_read() -> None:
    """Idle cells, messages, gathers, and a forward and a backward in one cell."""
    text = "0UNSHARD,0F0,0SEND_F0,0F1,,0RECV_B0,0B0,0B1,0REDUCE_GRAD\n,1RECV_F0,1F0,(1F1;1B0)OVERLAP_F_B, 1B1,,\n"
    s = from_csv(text)
    check(s)
    assert str(s) == "0F0 0F1 0B0 0B1\n1F0 1F1 1B0 1B1"


def test_a_cell_that_is_no_action_is_named() -> None:
    with pytest.raises(ScheduleError, match=r"rank 1, column 2: '1X0' is not an action"):
        from_csv("0F0,0B0\n1F0,,1X0\n")


def test_the_grid_marks_the_failing_cells() -> None:
    crossed = Schedule.parse("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1")
    with pytest.raises(ScheduleError) as caught:
        check(crossed)
    marked = failing(caught.value)
    assert [str(a) for a in marked] == ["0B0", "1F1"]
    assert grid(crossed, marked).splitlines() == [
        "rank 0   0F0  [0B0]  0F1   0B1",
        "rank 1   1F0  [1F1]  1B0   1B1",
    ]


def test_the_grid_shows_what_is_missing_and_little_else() -> None:
    s = one_f_one_b(2, 20)
    broken = Schedule(s.placement, 20, ([a for a in s.ranks[0] if a != Action.parse("0B19")], s.ranks[1]))
    with pytest.raises(ScheduleError) as caught:
        check(broken)
    (line,) = grid(broken, failing(caught.value), around=2).splitlines()
    assert line == "rank 0  ...  0F19   0B18  [0B19?]"


def test_a_trace_has_every_block() -> None:
    timeline = simulate(schedule_for("zbv", 3, 4))
    events = [e for e in json.loads(chrome_trace(timeline))["traceEvents"] if e["ph"] == "X"]
    assert {(e["name"], e["tid"], e["ts"], e["dur"]) for e in events} == {
        (str(x.action), x.rank, 1000 * x.start, 1000 * (x.end - x.start)) for x in timeline
    }


def test_a_picture_has_every_block_at_its_place() -> None:
    timeline = simulate(schedule_for("interleaved", 3, 4))
    svg = picture(timeline, title="interleaved").svg()
    fills = re.findall(r'<rect x="[\d.]+" y="[\d.]+" width="[\d.]+" height="30" rx="0" fill="(#\w+)"', svg)
    assert len(fills) == 3 + 3 * 2 * 4 * 2  # a background for each rank, then F and B
    assert len(set(fills)) == 1 + 2 * 2  # two shades of each
