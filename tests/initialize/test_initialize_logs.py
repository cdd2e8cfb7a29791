"""The logger: rank 0 speaks, others warn, files and JSON have everything."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from stretto.arguments import parse
from stretto.initialize.logs import logging_as
from stretto.train import directory
from stretto.train.directory import require_room

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


def test_a_line_of_a_file_is_not_cut(capfd: pytest.CaptureFixture[str]) -> None:
    """Catches: names of files that nobody can search for, as they are broken at 80 columns."""
    with logging_as(0) as log:
        log.warning("a" * 300 + "\x1b")
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith(" WARNING " + "a" * 300 + "·")


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


def test_a_full_disk_under_a_log_is_said_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches: a traceback for each line; and a rank that makes the directory anew, or fails, where it is there."""
    (tmp_path / "rank-00003.jsonl").symlink_to("/dev/full")
    with logging_as(3, directory=tmp_path) as log:
        for n in range(3):
            log.info("line %d", n)
    said = f"stretto: {tmp_path}/rank-00003.jsonl: No space left on device; the run goes on without this log\n"
    assert capfd.readouterr().err == said


def test_only_the_first_rank_of_a_node_tries_the_directory_of_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a try by each of ten thousand ranks, which share one file system."""
    args, made = parse(["--preset", "tiny", "--log-dir", str(tmp_path / "logs")]).args, []
    monkeypatch.setattr(directory, "mkdtemp", lambda **said: made.append(said) or str(Path(said["dir"]) / "tried"))
    monkeypatch.setattr(Path, "rmdir", lambda _: None)
    for first_here in (True, False):
        require_room(args, alone=False, first_here=first_here)
        assert len(made) == 1


def test_the_logger_is_left_as_it_was() -> None:
    logger = logging.getLogger("stretto")
    before = logger.level, logger.propagate, list(logger.handlers)
    with logging_as(0):
        pass
    assert (logger.level, logger.propagate, list(logger.handlers)) == before
