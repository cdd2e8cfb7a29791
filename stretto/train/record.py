"""What a run reports, and who listens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class StepRecord:
    """One finished update. `tokens` counts those seen so far, over all ranks."""

    step: int
    loss: float
    """Nats per token over the global batch."""
    grad_norm: float
    lr: float
    tokens: int
    tokens_per_second: float
    data_seconds: float = 0.0
    """That the host spent on making the batch; a device that has work meanwhile does not wait for it."""


@dataclass(frozen=True)
class EvalRecord:
    """Held-out text after `step` updates."""

    step: int
    loss: float
    """Nats per token."""
    bits_per_byte: float | None
    """None where the tokenizer loses text, which the model then never sees."""
    name: str = "held_out"
    """Of the validation set."""


class Listener(Protocol):
    """Told of everything on rank 0; does what it likes with it, and nothing else in the run depends on it."""

    def stepped(self, record: StepRecord) -> None: ...

    def evaluated(self, record: EvalRecord) -> None: ...

    def saved(self, step: int, path: Path) -> None: ...

    def close(self) -> None: ...


class Everyone:
    """Several listeners as one."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self.listeners = tuple(listeners)

    def stepped(self, record: StepRecord) -> None:
        for each in self.listeners:
            each.stepped(record)

    def evaluated(self, record: EvalRecord) -> None:
        for each in self.listeners:
            each.evaluated(record)

    def saved(self, step: int, path: Path) -> None:
        for each in self.listeners:
            each.saved(step, path)

    def close(self) -> None:
        for each in self.listeners:
            each.close()


class JsonLines:
    """`metrics.jsonl`: one object per line, `step` in each, steps and evaluations alike.

    A run that goes on after step `after` repeats all that followed the checkpoint of that step, its evaluation
    included; so what is here of it is dropped, and no row is ever missing or twice.
    """

    def __init__(self, path: Path, *, after: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_rows(path) if _before(row, after)] if after else []
        steps = [StepRecord(**row) for row in kept if "loss" in row]
        self.first: StepRecord | None = steps[0] if steps else None
        """Of the run before it goes on, as is `last`."""
        self.last: StepRecord | None = steps[-1] if steps else None
        temporary = path.with_name(path.name + ".tmp")  # killed now, the run still has all rows
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(path)
        self._file = path.open("a", buffering=1)

    def stepped(self, record: StepRecord) -> None:
        self._write(asdict(record))

    def evaluated(self, record: EvalRecord) -> None:
        row = {
            "step": record.step,
            f"{record.name}_loss": record.loss,
            f"{record.name}_bits_per_byte": record.bits_per_byte,
        }
        self._write({name: value for name, value in row.items() if value is not None})

    def saved(self, step: int, path: Path) -> None:
        """Nothing: the directory of the checkpoints says it."""

    def close(self) -> None:
        self._file.close()

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")


class TensorBoard:
    """The same numbers as TensorBoard scalars, against the step. `last`: the step after which the run goes on."""

    def __init__(self, directory: Path, *, last: StepRecord | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # loads slowly, and only rank 0 writes

        # Readers forget what lies in older files from this step on; what is of this very step is said again.
        self._writer: Any = SummaryWriter(str(directory), purge_step=last.step if last else None)
        if last is not None:
            self.stepped(last)

    def stepped(self, record: StepRecord) -> None:
        values = {
            "loss/train": record.loss,
            "grad_norm": record.grad_norm,
            "lr": record.lr,
            "tokens_per_second": record.tokens_per_second,
            "data_seconds": record.data_seconds,
        }
        for name, value in values.items():
            self._writer.add_scalar(name, value, record.step)

    def evaluated(self, record: EvalRecord) -> None:
        self._writer.add_scalar(f"loss/{record.name}", record.loss, record.step)
        if record.bits_per_byte is not None:
            self._writer.add_scalar(f"bits_per_byte/{record.name}", record.bits_per_byte, record.step)

    def saved(self, step: int, path: Path) -> None:
        """Nothing to plot."""

    def close(self) -> None:
        self._writer.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics file; none when there is no such file."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:  # the line that was being written when the run died
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def _before(row: dict[str, Any], after: int) -> bool:
    """Whether a row is from before the checkpoint of step `after` was whole."""
    return bool(row["step"] <= after if "loss" in row else row["step"] < after)
