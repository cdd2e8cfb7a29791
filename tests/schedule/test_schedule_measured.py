"""Measured steps as costs, files and timelines.

A cost that took the fastest holder of a stage, or the halves of a backward in the wrong order, is caught here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.cli.schedule import main
from stretto.schedule import GENERATORS, Cost, Schedule, ScheduleError, Span, lower, makespan, schedule_for, simulate
from stretto.schedule.measured import Measured, cost_of, cost_text, read_cost, stage_times
from stretto.schedule.picture import idle

pytestmark = pytest.mark.pure

COST = Cost.split((1.0, 2.0, 1.5, 3.0), (1.0, 1.0, 2.0, 0.5), (0.5, 0.25, 1.0, 2.0), hop=0.125)


def spans(s: Schedule, cost: Cost = COST, at: float = 100.0) -> list[Span]:
    """A step as ranks record it: on a clock of their own, each rank's in one piece."""
    return sorted((Span(x.rank, x.action, x.start + at, x.end + at) for x in simulate(s, cost)), key=lambda x: x.rank)


@given(name=st.sampled_from(["1f1b", "zb-h1", "interleaved", "zbv"]))
@settings(max_examples=settings.default.max_examples // 3)
def test_costs_of_what_was_simulated_are_its_costs(name: str) -> None:
    p = 4 if GENERATORS[name].stages == 1 else 2
    s = schedule_for(name, p, 3)
    measured = Measured.of(lower(s), [spans(s), spans(s, at=7.0)], hop=COST.hop)
    found = measured.cost()
    assert makespan(simulate(s, found)) == pytest.approx(makespan(simulate(s, COST)))
    assert makespan(measured.typical) == pytest.approx(makespan(simulate(s, COST)))
    again = Measured.read(measured.text(), "x")
    assert again.schedule == measured.schedule
    assert again.cost() == found
    assert read_cost(measured.text(), "x", 4) == found


def test_of_ranks_that_hold_one_stage_the_slowest_counts() -> None:
    s = schedule_for("zb-h1", 2, 2)
    cost = Cost.split((1.0, 2.0), (3.0, 1.0), (0.5, 0.25))
    slow = Cost.split((1.5, 1.0), (1.0, 2.0), (0.5, 0.25))
    times = [json.loads(json.dumps(stage_times(spans(s, each)))) for each in (cost, slow)]
    assert cost_of(times, 2, hop=0.5) == Cost.split((1.5, 2.0), (3.0, 2.0), (0.5, 0.25), hop=0.5)


def test_a_whole_backward_is_halved_where_its_halves_were_not_seen() -> None:
    s = schedule_for("1f1b", 2, 2)
    assert cost_of([stage_times(spans(s, Cost((1.0, 1.0), (3.0, 4.0))))], 2) == Cost(
        (1.0, 1.0), (3.0, 4.0), (1.5, 2.0), (1.5, 2.0)
    )
    with pytest.raises(ValueError, match="no forward and backward of stage 2"):
        cost_of([stage_times(spans(s, Cost()))], 3)


def test_files() -> None:
    assert read_cost(cost_text(COST), "x", 4) == COST
    with pytest.raises(ValueError, match="costs of 4 stages, but there are 8"):
        read_cost(cost_text(COST), "x", 8)
    for text in (
        "",
        "[]",
        "{}",
        '{"costs": {"forward": "a"}}',
        '{"costs": {"speed": 1}}',
        '{"costs": {"forward": -1}}',
    ):
        with pytest.raises(ValueError, match=r"mine\.json has no costs of stages"):
            read_cost(text, "mine.json")
    with pytest.raises(ValueError, match=r"mine\.json is no measured timeline"):
        Measured.read("{}", "mine.json")


def test_a_step_with_a_computation_too_few_is_rejected() -> None:
    s = schedule_for("zbv", 2, 2)
    with pytest.raises(ScheduleError, match="23 computations for 24"):
        Measured.of(s, [[x for x in spans(s, Cost()) if str(x.action) != "1F1"]])


def test_a_measured_step_is_drawn_beside_the_simulated_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: costs that are not those of the file, a picture of one of the two, an idle share of the wrong rank."""
    s = schedule_for("zbv", 2, 3)
    cost = Cost.split((1.0, 2.0, 1.5, 3.0), (1.0, 1.0, 2.0, 0.5), (0.5, 0.25, 1.0, 2.0))
    late = [Span(x.rank, x.action, x.start + 2 * (x.rank == 1), x.end + 2 * (x.rank == 1)) for x in spans(s, cost)]
    (tmp_path / "t.json").write_text(Measured.of(lower(s), [late]).text())
    svg, trace = tmp_path / "step.svg", tmp_path / "trace.json"
    assert main(["draw", "--measured", f"{tmp_path / 't.json'}", "--out", f"{svg}", "--out", f"{trace}"]) == 0
    said = capsys.readouterr().out
    ran, played = Measured.of(s, [late]).typical, simulate(s, cost)
    assert makespan(ran) > makespan(played)
    for rank in range(2):
        row = next(line.split() for line in said.splitlines() if line.startswith(f"{rank} "))
        assert row == [f"{rank}", f"{idle(ran)[rank]:.1%}", f"{idle(played)[rank]:.1%}"]
    drawn = svg.read_text()
    assert "measured: 2 ranks" in drawn
    assert "simulated: 2 ranks" in drawn
    assert len([e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]) == 4 * 3 * 3
    assert main(["simulate", "zbv", "--pp", "2", "--microbatches", "3", "--costs", f"{tmp_path / 't.json'}"]) == 0
    assert f"a step takes {makespan(played):g}" in capsys.readouterr().out
    assert main(["draw", "--measured", f"{svg}"]) == 2
    assert "is no measured timeline" in capsys.readouterr().err
