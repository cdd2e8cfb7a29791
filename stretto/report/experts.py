"""A heat-map of the loads of experts: a row for each layer, a column for each expert, light where it got nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stretto.train.routing import ExpertLog
from stretto.train.routing_record import RoutingRecord

CELL, LEFT, TOP = 14, 70, 40


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
            self.picture.write_text(heat_map(self.shares), encoding="utf-8")


def heat_map(records: Sequence[RoutingRecord]) -> str:
    """SVG of the loads over their mean, summed over the records; full colour at twice the mean."""
    layers = records[0].layers
    loads = [
        [sum(record.counts[n][e] for record in records) for e in range(len(records[0].counts[n]))]
        for n in range(len(layers))
    ]
    width, height = LEFT + CELL * len(loads[0]) + 20, TOP + CELL * len(layers) + 30
    steps = f"steps {records[0].step} to {records[-1].step}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{max(width, 360)}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<text x="8" y="18">load of each expert over the mean of its layer, {steps}</text>',
    ]
    for n, (layer, row) in enumerate(zip(layers, loads, strict=True)):
        mean, y = sum(row) / len(row) or 1.0, TOP + CELL * n
        lines.append(f'<text x="8" y="{y + 11}">layer {layer}</text>')
        for expert, load in enumerate(row):
            shade = round(255 * (1 - min(load / mean, 2) / 2))
            colour = f"rgb({shade},{(shade + 255) // 2 if load else 255},255)"
            lines.append(
                f'<rect x="{LEFT + CELL * expert}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" fill="{colour}">'
                f"<title>layer {layer}, expert {expert}: {load / mean:.2f}</title></rect>"
            )
    lines.append(f'<text x="{LEFT}" y="{height - 10}">expert 0 to {len(loads[0]) - 1}</text></svg>')
    return "\n".join(lines) + "\n"
