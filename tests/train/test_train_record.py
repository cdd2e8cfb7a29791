"""P18: the record of a run that goes on is that of one that never stopped.

Faults to catch: lines after the step kept; a line cut by the crash glued to the next; a line cut by the crash that
cannot be read; a new run that appends; a crash while the old lines are copied that loses them; rows that a full disk
loses though there is room again.
"""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.train.metrics_file import JsonLines, read_rows, step_records
from stretto.train.record import EvalRecord, Everyone, Listener, SaveRecord, StepRecord, TensorBoard, figures
from stretto.train.rows_file import MOST, RowsFile

pytestmark = pytest.mark.pure


def step(n: int) -> StepRecord:
    return StepRecord(n, loss=1 / n, grad_norm=2.0, lr=1e-3, tokens=64 * n, tokens_per_second=10.0)


def write(path: Path, steps: range, *, after: int) -> None:
    """A run that evaluates every second step; one that goes on repeats the evaluation at its checkpoint."""
    log = JsonLines(path, after=after)
    if after and after % 2 == 0:
        log.evaluated(EvalRecord(after, loss=3.0, bits_per_byte=4.0))
    for n in steps:
        log.stepped(step(n))
        if n % 2 == 0:
            log.evaluated(EvalRecord(n, loss=3.0, bits_per_byte=4.0))
    log.close()


def test_reads_like_a_run(tmp_path: Path) -> None:
    write(tmp_path / "new" / "metrics.jsonl", range(1, 3), after=0)
    assert [json.loads(line) for line in (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": 1.0, "grad_norm": 2.0, "lr": 1e-3, "tokens": 64, "tokens_per_second": 10.0},
        {"step": 2, "loss": 0.5, "grad_norm": 2.0, "lr": 1e-3, "tokens": 128, "tokens_per_second": 10.0},
        {"step": 2, "held_out_loss": 3.0, "held_out_bits_per_byte": 4.0},
    ]


@given(stop=st.integers(1, 6), lost=st.integers(0, 4), cut=st.integers(0, 200))
def test_going_on_gives_the_uninterrupted_record(
    tmp_path_factory: pytest.TempPathFactory, stop: int, lost: int, cut: int
) -> None:
    """However far beyond the last checkpoint the lost run came, and at whatever byte its last line was cut."""
    directory = tmp_path_factory.mktemp("record")
    whole, broken = directory / "whole.jsonl", directory / "broken.jsonl"
    write(whole, range(1, 9), after=0)
    write(broken, range(1, stop + lost + 1), after=0)
    text = broken.read_text()
    kept = text.index(f'{{"step": {stop}, "loss"')  # what the checkpoint is of had been written before it
    broken.write_text(text[: max(text.index("\n", kept) + 1, len(text) - cut)])
    write(broken, range(stop + 1, 9), after=stop)
    assert broken.read_text() == whole.read_text()


def test_losses_of_further_tokens_are_kept_and_drawn_one_by_one(tmp_path: Path) -> None:
    """Catches: rows with a list that count as none when the run goes on; one curve for all of them."""
    told = replace(step(1), mtp_losses=(5.5, 6.5))
    log = JsonLines(tmp_path / "metrics.jsonl", after=0)
    log.stepped(told)
    log.close()
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert row["mtp_losses"] == [5.5, 6.5]
    (read,) = step_records([row, {**row, "mtp_losses": ["x"]}])
    assert read == replace(told, mtp_losses=[5.5, 6.5])
    curves = figures(read)
    assert (curves["loss/mtp_1"], curves["loss/mtp_2"], "mtp_losses" in curves) == (5.5, 6.5, False)


def test_a_last_line_without_its_end_is_not_glued_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 2), after=0)
    path.write_text(path.read_text().rstrip("\n"))
    write(path, range(2, 3), after=1)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 2]


def test_foreign_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 2), after=0)
    row = path.read_text()
    path.write_text('5\n{"other": 1}\nnot json\n\n' + row)
    log = JsonLines(path, after=1)
    log.close()
    assert path.read_text() == row
    assert log.first == log.last == step(1)


def test_a_new_run_begins_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4), after=0)
    write(path, range(1, 2), after=0)
    assert len(path.read_text().splitlines()) == 1


def test_a_crash_while_going_on_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old lines are there until the new file is whole."""
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4), after=0)
    before = path.read_text()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        JsonLines(path, after=2)
    assert path.read_text() == before


def test_lines_are_on_disk_at_once(tmp_path: Path) -> None:
    """Who is killed has written what it reported."""
    log = JsonLines(tmp_path / "metrics.jsonl", after=0)
    log.stepped(step(1))
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1
    log.close()


def test_everyone_tells_all_in_order(tmp_path: Path) -> None:
    told: list[tuple[str, object]] = []

    class Ear(Listener):
        def __init__(self, name: str) -> None:
            self.name = name

        def stepped(self, record: StepRecord) -> None:
            told.append((self.name, record.step))

        def evaluated(self, record: EvalRecord) -> None:
            told.append((self.name, record.bits_per_byte))

        def saved(self, record: SaveRecord) -> None:
            told.append((self.name, (record.step, record.path)))

        def close(self) -> None:
            told.append((self.name, "close"))

    both = Everyone([Ear("a"), Ear("b")])
    both.stepped(step(7))
    both.evaluated(EvalRecord(7, 3.0, 4.0))
    both.saved(SaveRecord(7, tmp_path, 0.5))
    both.close()
    assert told == [(name, what) for what in (7, 4.0, (7, tmp_path), "close") for name in "ab"]


def test_a_figure_that_is_none_has_no_place_in_the_row(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "m.jsonl", after=0)
    log.evaluated(EvalRecord(1, 3.0, None))
    log.close()
    assert read_rows(tmp_path / "m.jsonl") == [{"step": 1, "held_out_loss": 3.0}]


def test_a_run_goes_on_where_there_is_no_room_for_curves(caplog: pytest.LogCaptureFixture) -> None:
    """Catches: an error of TensorBoard's in `close`, behind which that of the checkpoint stood, which ended the run."""

    class Full:
        def close(self, *_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        add_scalar = close

    curves = TensorBoard.__new__(TensorBoard)
    curves._writer, curves._lost = Full(), False
    curves.stepped(step(1))
    curves.close()
    assert [record.getMessage() for record in caplog.records] == [
        "no more curves for TensorBoard: No space left on device"
    ]


class Disk:
    """Takes bytes while there is room, and the last ones in part."""

    def __init__(self, path: Path, room: int) -> None:
        self.file, self.room = path.open("ab", buffering=0), room

    def write(self, some: bytes) -> int:
        taken = min(self.room, len(some))
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= taken
        return self.file.write(some[:taken])

    def close(self) -> None:
        self.file.close()


def test_rows_wait_for_room_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches: a run that a full disk under its metrics ends; a row that is lost or cut though room was made."""
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path, after=0)
    log._rows.close()
    log._rows._file = disk = Disk(path, room=150)  # type: ignore[assignment]
    for n in range(1, 4):
        log.stepped(step(n))
    said = f"{path}: No space left on device; the run goes on, and its rows wait for room"
    assert [record.getMessage() for record in caplog.records] == [said]
    disk.room = 10_000
    log.stepped(step(4))
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4]
    disk.room = 10
    for n in (5, 6):
        log.stepped(step(n))
    log.close()
    assert [record.getMessage() for record in caplog.records[1:]] == [
        said,
        f"{path} lacks 2 rows, for which there was no room",
    ]


def test_rows_that_wait_are_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches: a disk that stays full, and fills the memory."""
    rows = RowsFile(tmp_path / "metrics.jsonl")
    rows._file.close()
    rows._file = Path("/dev/full").open("ab", buffering=0)  # type: ignore[assignment]  # noqa: SIM115
    for _ in range(20):
        rows.write({"x": "y" * 2**20})
    assert len(rows._waiting) <= MOST
    rows.close()
    assert caplog.records[-1].getMessage().endswith("lacks 20 rows, for which there was no room")


def test_a_full_disk_before_the_run_is_said_with_the_name_of_the_file(tmp_path: Path) -> None:
    """Catches: an errno alone."""
    (tmp_path / "metrics.jsonl.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
        RowsFile(tmp_path / "metrics.jsonl", ["{}"])
