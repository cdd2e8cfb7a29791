"""What is told of experts: rows, a picture, a warning of one that starves."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from stretto.report.experts import ExpertPicture, heat_map
from stretto.train.routing import PATIENCE
from stretto.train.routing_record import RoutingRecord

pytestmark = pytest.mark.gloo


def record(step: int, *rows: tuple[int, ...]) -> RoutingRecord:
    zeros = tuple((0,) * len(row) for row in rows)
    figures = (tuple(1.0 for _ in rows),) * 5
    return RoutingRecord(step, tuple(range(len(rows))), rows, zeros, zeros, *figures)


def test_rows_and_a_picture(tmp_path: Path) -> None:
    """A run that goes on drops what came after its checkpoint; the picture shows the shares of what was told."""
    path = tmp_path / "experts.jsonl"
    for after in (0, 2):
        log = ExpertPicture(path, after=after)
        for step in range(after + 1, after + 4):
            log.routed(record(step, (4, 0, 2, 2), (2, 2, 2, 2)))
        log.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["layer"]) for row in rows] == [(n, layer) for n in range(1, 6) for layer in (0, 1)]
    drawn = (tmp_path / "experts.svg").read_text()
    assert drawn.count("<title>") == 8
    assert "layer 0, expert 0: 2.00" in drawn
    assert "layer 0, expert 1: 0.00" in drawn
    assert drawn == heat_map(log.shares).svg()


def test_an_expert_that_starves_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Only after so many lines in a row."""
    log = ExpertPicture(tmp_path / "experts.jsonl", after=0)
    starved = (400, 0, 400, 400)
    with caplog.at_level(logging.WARNING):
        for step in range(PATIENCE - 1):
            log.routed(record(step, starved))
        log.routed(record(98, (400, 400, 400, 400)))
        for step in range(100, 100 + 2 * PATIENCE):
            log.routed(record(step, starved))
    log.close()
    (said,) = caplog.messages
    assert said.startswith(f"expert 1 of layer 0 starves: 0 of 1200 assignments in step {99 + PATIENCE}")
