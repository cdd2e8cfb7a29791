"""`metrics.jsonl`, written and read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from stretto.train.record import EvalRecord, Listener, SaveRecord, StepRecord, figures
from stretto.train.rows_file import RowsFile


class JsonLines(Listener):
    """`metrics.jsonl`: one object per line, `step` in each, steps and evaluations alike.

    A run that goes on after step `after` repeats all that followed the checkpoint of that step, its evaluation
    included; so what is here of it is dropped, and no row is ever missing or twice.
    """

    def __init__(self, path: str | Path, *, after: int = 0) -> None:
        path = Path(path)
        kept = [row for row in read_rows(path) if _before(row, after)] if after else []
        steps = step_records(kept)
        self.first: StepRecord | None = steps[0] if steps else None
        """Of the run before it goes on, as is `last`."""
        self.last: StepRecord | None = steps[-1] if steps else None
        self._rows = RowsFile(path, [json.dumps(row) for row in kept])

    def stepped(self, record: StepRecord) -> None:
        self._rows.write({key: value for key, value in asdict(record).items() if value is not None})

    def evaluated(self, record: EvalRecord) -> None:
        row = {f"{record.name}_loss": record.loss, f"{record.name}_bits_per_byte": record.bits_per_byte}
        row["evaluation_seconds"] = record.seconds
        self._rows.write({"step": record.step, **{key: value for key, value in row.items() if value is not None}})

    def saved(self, record: SaveRecord) -> None:
        self._rows.write({"step": record.step, **{k.replace("/", "_"): value for k, value in figures(record).items()}})

    def close(self) -> None:
        self._rows.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics file; none when there is no such file."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # the line that was being written when the run died
            continue
        if isinstance(row, dict) and _is_figure("step", row.get("step")):
            rows.append(row)
    return rows


def step_records(rows: Sequence[dict[str, Any]]) -> list[StepRecord]:
    """The updates among the rows of a metrics file; a row with something else in it is none."""
    needed = {field.name for field in fields(StepRecord) if field.default is MISSING}
    names = {field.name for field in fields(StepRecord)}
    return [
        StepRecord(**row)
        for row in rows
        if needed <= row.keys() <= names and all(_is_figure(name, value) for name, value in row.items())
    ]


def _is_figure(name: str, x: object) -> bool:
    if name == "mtp_losses":
        return isinstance(x, list) and all(_is_figure("", each) for each in x)
    return isinstance(x, str) if name == "time" else isinstance(x, (int, float)) and not isinstance(x, bool)


def _before(row: dict[str, Any], after: int) -> bool:
    """Whether a row is from before the checkpoint of step `after` was whole."""
    return bool(row["step"] <= after if "loss" in row or "checkpoint_bytes" in row else row["step"] < after)
