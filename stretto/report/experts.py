"""A heat-map of the loads of experts: a row for each layer, a column for each expert, light where it got nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from stretto.layout.picture import WHITE, Colour, Picture, Rect, Words, blend
from stretto.reading import reason
from stretto.train.routing import ExpertLog
from stretto.train.routing_record import RoutingRecord

CELL, LEFT, TOP = 14, 70, 40
FULL: Colour = (0, 128, 255)


class ExpertPicture(ExpertLog):
    """An `ExpertLog` that leaves `experts.svg` beside it: the mean loads over the last lines of the run."""

    LINES = 50

    def __init__(self, path: Path, *, after: int) -> None:
        super().__init__(path, after=after)
        self.picture = path.with_suffix(".svg")

    def routed(self, record: RoutingRecord) -> None:
        super().routed(record)
        del self.shares[: -self.LINES]

    def close(self) -> None:
        super().close()
        if self.shares:
            try:
                heat_map(self.shares).save(self.picture)
            except OSError as error:  # a full disk: no picture is worth the run
                logging.getLogger(__name__).warning("%s cannot be written: %s", self.picture, reason(error))


def heat_map(records: Sequence[RoutingRecord]) -> Picture:
    """The loads over their mean, summed over the records; full colour at twice the mean."""
    layers = records[0].layers
    loads = [[sum(counts) for counts in zip(*(r.counts[n] for r in records), strict=True)] for n in range(len(layers))]
    width, height = max(LEFT + CELL * len(loads[0]) + 20, 360), TOP + CELL * len(layers) + 30
    steps = f"steps {records[0].step} to {records[-1].step}"
    shapes: list[Rect | Words] = [Words(8, 14, f"load of each expert over the mean of its layer, {steps}", 11)]
    for n, (layer, row) in enumerate(zip(layers, loads, strict=True)):
        mean, y = sum(row) / len(row) or 1.0, TOP + CELL * n
        shapes.append(Words(8, y + CELL / 2, f"layer {layer}", 11))
        for expert, load in enumerate(row):
            title = f"layer {layer}, expert {expert}: {load / mean:.2f}"
            fill = blend(WHITE, FULL, min(load / mean, 2) / 2)
            shapes.append(Rect(LEFT + CELL * expert, y, CELL - 1, CELL - 1, fill, title=title))
    shapes.append(Words(LEFT, height - 14, f"expert 0 to {len(loads[0]) - 1}", 11))
    return Picture(width, height, tuple(shapes))
