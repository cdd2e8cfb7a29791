"""The logger: rank 0 speaks, others warn, files and JSON have everything."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from stretto.initialize.logs import logging_as

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(("rank", "expected"), [(0, ["all is well", "careful"]), (3, ["careful"])])
def test_rank_0_speaks_and_others_warn(rank: int, expected: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with logging_as(rank, style="json") as log:
        log.info("all is well")
        log.warning("careful", extra={"step": 7})
    entries = [json.loads(text) for text in capfd.readouterr().err.splitlines()]
    assert [entry["message"] for entry in entries] == expected
    assert all(entry["rank"] == rank for entry in entries)
    assert (entries[-1]["level"], entries[-1]["step"]) == ("warning", 7)


def test_other_ranks_name_themselves_on_the_console(capfd: pytest.CaptureFixture[str]) -> None:
    with logging_as(3) as log:
        log.info("quiet")
        log.warning("careful")
    err = capfd.readouterr().err
    assert "[rank 3] careful" in err
    assert "quiet" not in err


def test_every_rank_writes_everything_to_its_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with logging_as(12, directory=tmp_path) as log:
        log.debug("a detail")
        try:
            raise ValueError("a fault")
        except ValueError:
            logging.getLogger("stretto.train").exception("went wrong")
    entries = [json.loads(text) for text in (tmp_path / "rank-00012.jsonl").read_text().splitlines()]
    assert [entry["message"] for entry in entries] == ["a detail", "went wrong"]
    assert entries[1]["logger"] == "stretto.train"
    assert "ValueError: a fault" in entries[1]["error"]


def test_the_logger_is_left_as_it_was() -> None:
    logger = logging.getLogger("stretto")
    before = logger.level, logger.propagate, list(logger.handlers)
    with logging_as(0):
        pass
    assert (logger.level, logger.propagate, list(logger.handlers)) == before
