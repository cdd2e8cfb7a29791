"""Layers over stages where a block may be cut between its attention and its feed-forward: only for a gain."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Final

from stretto.schedule.blocks import amounts
from stretto.schedule.partition import balanced

WORTH: Final = 0.01
"""Blocks are cut where the rank that has most to do then has this share less: a cut block has its norms and its
residual in two places, and pictures and messages are harder to read."""


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

    Where `attention`, the share of a layer's cost that is its attention, is known, the stages are balanced in halves of
    layers, too. These are taken if the rank that has most to do has more than `WORTH` less than with whole layers.
    """
    ends = (embedding, head)
    whole = balanced(layers, len(home), ends)
    if attention is None or len(home) == 1 or not layers:
        return whole
    halves = balanced(layers, len(home), ends, attention)
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
