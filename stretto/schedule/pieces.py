"""What the pieces of a model take, so that the costs of its stages follow for any split of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stretto.schedule.actions import F, I, W
from stretto.schedule.blocks import amounts, counts_text
from stretto.schedule.costs import Cost
from stretto.schedule.measured import read_cost, read_layers

Times = tuple[float, float, float]
"""Times of F, I and W."""
Shares = Times | None
"""Of the times of a layer, its attention's: None where that is unknown."""
_NONE: Times = (0.0, 0.0, 0.0)
_UNKNOWN = (None, None, None)


@dataclass(frozen=True)
class Pieces:
    """Times of one layer, of the embedding on the first stage and of the head on the last; the others as in `Cost`.

    `shares` are attention's of a layer's times; unknown, stages of halves of layers have no costs.
    """

    layer: Times
    embedding: Times = _NONE
    head: Times = _NONE
    shares: Shares = None
    hop: float = 0.0
    transfer: float = 0.0
    finish: float = 0.0
    barrier: bool = True

    @classmethod
    def of(cls, cost: Cost, layers: Sequence[float], shares: Shares = None) -> Pieces:
        """What explains the costs of stages with so many layers each; `shares` of F, I and W are attention's.

        A layer takes what those of the middle stages take; where these have none, what is left of it in the end that
        spends least on each. What the ends take beyond their layers is the embedding and the head. Raises ValueError
        where no stage has a layer.
        """
        last, stages = len(layers) - 1, np.arange(len(layers))
        found: list[Times] = []
        for op, share in zip((F, I, W), shares or _UNKNOWN, strict=True):
            n = np.asarray(_amounts(layers, share))
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
        return cls(layer, embedding, head, shares, **cost.around)

    def cost(self, layers: Sequence[float]) -> Cost:
        """Of stages with so many layers each, in halves where it is known what attention takes."""
        last, times = len(layers) - 1, []
        for one, first, end, share in zip(self.layer, self.embedding, self.head, self.shares or _UNKNOWN, strict=True):
            held = enumerate(_amounts(layers, share))
            times.append(tuple(n * one + first * (s == 0) + end * (s == last) for s, n in held))
        around = {"hop": self.hop, "transfer": self.transfer, "finish": self.finish, "barrier": self.barrier}
        return Cost.split(*times, **around)

    def loads(self, layers: Sequence[float]) -> list[float]:
        """What each such stage has to do, in layers."""
        cost, one = self.cost(layers), sum(self.layer)
        stages = np.arange(len(layers))
        total = sum(cost.times(stages, np.full(len(layers), op)) for op in (F, I, W))
        return [float(each) / one if one else 0.0 for each in np.asarray(total)]

    @property
    def attention(self) -> float | None:
        """Attention's share of all that a layer takes."""
        one = sum(self.layer)
        if self.shares is None or not one:
            return None
        return sum(share * part for share, part in zip(self.shares, self.layer, strict=True)) / one

    @property
    def ends(self) -> tuple[float, float]:
        """All that the embedding and the head take, in layers."""
        one = sum(self.layer)
        return (sum(self.embedding) / one, sum(self.head) / one) if one else (0.0, 0.0)


def _amounts(layers: Sequence[float], attention: float | None) -> list[float]:
    """What each stage has to do of its layers, in layers, where attention has such a share of one.

    Raises ValueError for halves of layers where that is unknown.
    """
    if attention is None and any(n % 1 for n in layers):
        raise ValueError(f"stages of {counts_text(layers)} layers: it is not known what attention takes of a layer")
    return amounts(layers, attention or 0.0)


def cost_for(text: str, name: str, layers: Sequence[float], shares: Shares = None) -> Cost:
    """The costs in the file `name` for stages with so many layers each, whatever stages were measured; `shares` of F,
    I and W in a layer are attention's.

    Raises ValueError for a file without costs, or with those of other stages and without their layers.
    """
    held = read_layers(text)
    if held is None or held == tuple(layers):
        return read_cost(text, name, len(layers))
    return pieces_in(text, name, shares).cost(layers)


def pieces_in(text: str, name: str, shares: Shares = None) -> Pieces:
    """What the pieces of the model take by the costs in the file `name`. Raises ValueError where they do not say."""
    held = read_layers(text)
    if held is None:
        raise ValueError(f"{name} does not say how many layers its stages have; remove it to have them measured anew")
    return Pieces.of(read_cost(text, name, len(held)), held, shares)
