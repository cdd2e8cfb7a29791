"""Layers over stages where a block may be cut between its attention and its feed-forward: only for a gain."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from stretto.schedule.blocks import amounts
from stretto.schedule.partition import partition

WORTH: Final = 0.01
"""Blocks are cut where the rank that has most to do then has this share less: a cut block has its norms and its
residual in two places, and pictures and messages are harder to read."""

_EVEN: Final = 1e-9
"""Costs that differ by less are alike: floating-point noise."""


@cache
def layers_by_cost(
    layers: int,
    home: tuple[int, ...],
    *,
    attention: float | None = None,
    embedding: float = 0.0,
    head: float = 0.0,
) -> tuple[float, ...]:
    """How many layers each stage holds, of stages that lie on the ranks of `home`.

    Of whole layers `partition` says it. Where `attention`, the share of a layer's cost that is its attention, is known,
    the stages are also balanced in halves of layers: the most costly stage as cheap as can be, then the sum of squares
    of all. These are taken if the rank that has most to do has more than `WORTH` less than with whole layers.
    """
    whole = tuple(float(len(held)) for held in partition(layers, len(home), embedding=embedding, head=head))
    if attention is None or len(home) == 1 or not layers:
        return whole
    ends = (embedding, head)
    halves = _in_halves(layers, len(home), attention, ends)
    before, after = (busiest(counts, home, attention, ends) for counts in (whole, halves))
    return halves if after < before * (1 - WORTH) else whole


def busiest(counts: Sequence[float], home: Sequence[int], attention: float, ends: tuple[float, float]) -> float:
    """What the rank has to do that has most, in layers; `ends`: of the embedding and the head."""
    loads = [0.0] * (max(home) + 1)
    for rank, load in zip(home, amounts(counts, attention), strict=True):
        loads[rank] += load
    loads[home[0]] += ends[0]
    loads[home[-1]] += ends[1]
    return max(loads)


def _in_halves(layers: int, stages: int, attention: float, ends: tuple[float, float]) -> tuple[float, ...]:
    """The best counts: over the sublayers before each boundary, stage by stage."""
    at = np.arange(2 * layers + 1)
    before = at // 2 + (at % 2) * attention
    extra = np.zeros(stages)
    extra[0] += ends[0]
    extra[-1] += ends[1]
    most = _least_most(before, extra, attention)
    cut = (at % 2) * 1e-6  # of splits that are alike the one with fewer cuts
    best = np.where(at == 0, 0.0, np.inf)
    chosen = []
    for s in range(stages):
        found, taken = np.full(len(at), np.inf), np.zeros(len(at), int)
        # The largest first: of splits that are alike later stages have more, since earlier ones keep more activations.
        for n in range(min(2 * layers, int(2 * most) + 2), -1, -1):
            cost = before[n:] - before[: len(at) - n] + extra[s]
            total = np.where(cost <= most + _EVEN, best[: len(at) - n] + cost**2 + cut[n:], np.inf)
            better = total < found[n:] - _EVEN
            found[n:][better], taken[n:][better] = total[better], n
        best = found
        chosen.append(taken)
    counts, end = [], 2 * layers
    for taken in reversed(chosen):
        counts.append(float(taken[end]) / 2)
        end -= int(taken[end])
    return tuple(reversed(counts))


def _least_most(before: NDArray[np.float64], extra: NDArray[np.float64], attention: float) -> float:
    """The least that the most costly stage can cost."""
    whole = np.arange(len(before) // 2 + 1)
    of_layers = (whole, whole + attention, whole + (1 - attention))
    costs = np.unique(np.concatenate([each + end for each in of_layers for end in {0.0, *extra.tolist()}]))
    costs = costs[costs >= extra.max()]
    low, high = 0, len(costs) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _fits(before, extra, float(costs[middle])) else (middle + 1, high)
    return float(costs[low])


def _fits(before: NDArray[np.float64], extra: NDArray[np.float64], most: float) -> bool:
    """Whether all sublayers find a place where no stage costs more."""
    at = 0
    for spent in extra:
        at = int(np.searchsorted(before, before[at] + most - spent + _EVEN, side="right")) - 1
    return at == len(before) - 1
