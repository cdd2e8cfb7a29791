"""How a step routed its tokens: per layer and expert, over the whole global batch."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from stretto.experts import Routing
from stretto.train.readback import Readback
from stretto.train.record import Listener
from stretto.train.routing_record import RoutingRecord
from stretto.train.rows_file import RowsFile

STARVING: Final = 0.01
"""Share of the mean load below which an expert starves."""
PATIENCE: Final = 20
"""Lines on which it must."""


@dataclass(frozen=True)
class RoutingReadback:
    """The figures of a `Routing` on their way to the host."""

    layers: tuple[int, ...]
    experts: int
    values: Readback

    @classmethod
    def of(cls, routing: Routing) -> RoutingReadback:
        """Begin to read it."""
        each: tuple[Tensor, ...] = (
            *(routing.counts, routing.dropped, routing.bias, routing.load(), routing.entropy()),
            *(routing.lost(), routing.loss(), routing.z),
        )
        return cls(routing.layers, routing.counts.shape[1], Readback(*each))

    def record(self, step: int) -> RoutingRecord:
        """What it says of a step."""
        values, rows = iter(self.values.read()), len(self.layers)

        def table() -> tuple[tuple[float, ...], ...]:
            return tuple(tuple(next(values) for _ in range(self.experts)) for _ in range(rows))

        def column() -> tuple[float, ...]:
            return tuple(next(values) for _ in range(rows))

        counts, dropped, bias = table(), table(), table()
        return RoutingRecord(
            step,
            self.layers,
            tuple(tuple(map(int, row)) for row in counts),
            tuple(tuple(map(int, row)) for row in dropped),
            bias,
            *(column() for _ in range(5)),
        )


class ExpertLog(Listener):
    """`experts.jsonl`: an object for each layer and line that is told. Warns, once for each, of an expert that starves.

    A run that goes on after step `after` drops what followed it.
    """

    def __init__(self, path: Path, *, after: int) -> None:
        old = path.read_text(encoding="utf-8").splitlines() if after and path.is_file() else []
        self._rows = RowsFile(path, [line for line in old if _step(line) <= after])
        self._starving = Counter[tuple[int, int]]()
        self.shares: list[RoutingRecord] = []
        """All that was told, of which a picture is drawn."""

    def routed(self, record: RoutingRecord) -> None:
        self.shares.append(record)
        for row in record.rows():
            self._rows.write(row)
        for layer, counts in zip(record.layers, record.counts, strict=True):
            mean = sum(counts) / len(counts)
            for expert, count in enumerate(counts):
                if count >= STARVING * mean:
                    del self._starving[layer, expert]
                    continue
                self._starving[layer, expert] += 1
                if self._starving[layer, expert] == PATIENCE:
                    logging.getLogger(__name__).warning(
                        "expert %d of layer %d starves: %d of %d assignments in step %d, and below %g of the mean on "
                        "%d lines; raise --balance-loss, or say --router-bias",
                        *(expert, layer, count, sum(counts), record.step, STARVING, PATIENCE),
                    )

    def close(self) -> None:
        self._rows.close()


def _step(line: str) -> float:
    """The step of a row; beyond all of them where it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return float("inf")
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else float("inf")
