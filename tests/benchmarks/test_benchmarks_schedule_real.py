"""Steps of a real model beside those predicted from what its stages take: here with sleeps, to know what they take.

Faults to catch: a cost that holds the wait for a message; a program that runs on under the name of the next one.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.schedule_real import Plan, Row, predicted, row_of, rows_of, set_up, table
from benchmarks.schedule_steps import Padded
from benchmarks.train.data import write_tokens
from benchmarks.train.shapes import SHAPES, Job
from stretto.schedule import Cost, makespan, schedule_for, simulate
from stretto.testing import Pool
from stretto.world import World

SECONDS = {0: 0.002, 1: 0.08}
"""Of each computation of a stage."""


def plan_of(directory: Path, *names: str) -> Plan:
    tokens = directory / "tokens"
    write_tokens(tokens, SHAPES["D0"])
    return Plan(Job(SHAPES["D0"], "pp", 2, "cpu", "fp32", False, str(tokens)), names, warm=1, steps=2)


def every(world: World, plan: Plan) -> list[Row]:
    return [row for row, _ in rows_of(plan, world)]


def uneven(world: World, plan: Plan) -> Row:
    with set_up(plan, "1f1b", world) as peer:
        executor = peer.built.stepper.executor
        padded = {s: Padded(stage, dict.fromkeys("FBIW", SECONDS[s])) for s, stage in executor.stages.items()}
        executor.stages = padded  # type: ignore[assignment]
        return row_of(plan, "1f1b", peer, world)[0]


@pytest.mark.gloo
def test_costs_hold_no_waits_and_the_step_is_theirs(pool: Pool, tmp_path: Path) -> None:
    """Rank 0 waits most of the time: catches a cost that holds the wait for a message, an order
    other than that which ran, and a step that the costs have nothing to do with. A machine at work adds to all."""
    row = pool.run(2, uneven, plan_of(tmp_path, "1f1b"))[0]
    for taken in (row.cost.forward, row.cost.backward):
        assert isinstance(taken, tuple)
        assert taken[0] < SECONDS[1] / 2
        assert taken[1] >= SECONDS[1]
    assert row.span_simulated >= 8 * SECONDS[1]  # four microbatches, there and back
    assert row.simulated / 2 < row.measured < 3 * row.simulated


@pytest.mark.gloo
def test_schedules_of_one_placement_share_a_model(pool: Pool, tmp_path: Path) -> None:
    """Catches a schedule that is left out, or measured by the order of another one."""
    names = "zbv", "1f1b", "auto", "zb-h1", "interleaved"
    rows = {row.name: row for row in pool.run(2, every, plan_of(tmp_path, *names))[0]}
    assert sorted(rows) == sorted(names)
    assert rows["1f1b"].placement == rows["zb-h1"].placement == [0, 1]
    assert rows["interleaved"].placement == [0, 1, 0, 1]
    assert rows["zbv"].placement == rows["auto"].placement == [0, 1, 1, 0]
    assert rows["1f1b"].cost.input_gradient == rows["1f1b"].cost.weight_gradient  # halves of a whole backward
    assert rows["zb-h1"].cost.input_gradient != rows["zb-h1"].cost.weight_gradient
    for row in rows.values():
        assert len(row.steps) == 2
        assert len(row.layers) == len(row.placement)
        assert sum(row.layers) == SHAPES["D0"].layers
    assert table(list(rows.values())).count("\n") == 1 + len(names)


@pytest.mark.pure
def test_an_update_overlaps_the_wait_for_the_first_message() -> None:
    """Rank 1 begins one forward later than rank 0: so much of its update costs nothing."""
    timeline = simulate(schedule_for("1f1b", 2, 4), Cost())
    span = makespan(timeline)
    assert predicted(timeline, 0.5, [0.25, 0.25]) == pytest.approx(span + 0.75)
    assert predicted(timeline, 0.5, [0.25, 1.0]) == pytest.approx(span + 0.75)
    assert predicted(timeline, 0.5, [0.25, 2.0]) == pytest.approx(span + 1.5)
