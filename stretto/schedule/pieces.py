"""What the pieces of a model take, so that the costs of its stages follow for any split of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stretto.schedule.actions import F, I, W
from stretto.schedule.costs import Cost
from stretto.schedule.measured import read_cost, read_layers

Times = tuple[float, float, float]
"""Times of F, I and W."""
_NONE: Times = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Pieces:
    """Times of one layer, of the embedding on the first stage and of the head on the last; `hop` as in `Cost`."""

    layer: Times
    embedding: Times = _NONE
    head: Times = _NONE
    hop: float = 0.0
    transfer: float = 0.0
    finish: float = 0.0

    @classmethod
    def of(cls, cost: Cost, layers: Sequence[int]) -> Pieces:
        """What explains the costs of stages with so many layers each.

        A layer takes what those of the middle stages take; where these have none, what is left of it in the end that
        spends least on each. What the ends take beyond their layers is the embedding and the head. Raises ValueError
        where no stage has a layer.
        """
        n, last = np.asarray(layers, float), len(layers) - 1
        stages = np.arange(len(layers))
        found: list[Times] = []
        for op in (F, I, W):
            t = cost.times(stages, np.full(len(layers), op))
            inner = slice(1, last)
            if n[inner].sum() > 0:
                each = float(t[inner].sum() / n[inner].sum())
            elif len(ends := [s for s in (0, last) if n[s]]):
                each = min(float(t[s] / n[s]) for s in ends)
            else:
                raise ValueError(f"stages of {list(layers)} layers do not say what a layer takes")
            beyond = np.maximum(t - n * each, 0.0)
            found.append((each, float(beyond[0]), float(beyond[last]) if last else 0.0))
        layer, embedding, head = ((f, i, w) for f, i, w in zip(*found, strict=True))
        return cls(layer, embedding, head, hop=cost.hop, transfer=cost.transfer, finish=cost.finish)

    def cost(self, layers: Sequence[int]) -> Cost:
        """Of stages with so many layers each."""
        last = len(layers) - 1
        times = [
            tuple(n * one + first * (s == 0) + end * (s == last) for s, n in enumerate(layers))
            for one, first, end in zip(self.layer, self.embedding, self.head, strict=True)
        ]
        return Cost.split(*times, hop=self.hop, transfer=self.transfer, finish=self.finish)

    @property
    def ends(self) -> tuple[float, float]:
        """All that the embedding and the head take, in layers."""
        one = sum(self.layer)
        return (sum(self.embedding) / one, sum(self.head) / one) if one else (0.0, 0.0)


def cost_for(text: str, name: str, layers: Sequence[int]) -> Cost:
    """The costs in the file `name` for stages with so many layers each, whatever stages were measured.

    Raises ValueError for a file without costs, or with those of other stages and without their layers.
    """
    held = read_layers(text)
    if held is None or held == tuple(layers):
        return read_cost(text, name, len(layers))
    return pieces_in(text, name).cost(layers)


def pieces_in(text: str, name: str) -> Pieces:
    """What the pieces of the model take by the costs in the file `name`. Raises ValueError where they do not say."""
    held = read_layers(text)
    if held is None:
        raise ValueError(f"{name} does not say how many layers its stages have; remove it to have them measured anew")
    return Pieces.of(read_cost(text, name, len(held)), held)
