"""Schedules of a loop: forwards in groups of microbatches, then one forward, one backward in turn.

All of them are one rule. Rank r runs its forwards in an order that all ranks share, stage by stage within a group of
microbatches; `warmup(r)` of them come before the first backward, and from there on backwards follow, in the mirrored
order, one to each forward. Where the backward is split, W j stands directly after I j + `delay(r)`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from stretto.layout.stages import placement
from stretto.schedule.actions import B, F, I, Ints, W, encode, mbs_of
from stretto.schedule.ir import Schedule


def gpipe(p: int, m: int) -> Schedule:
    """All forwards, then all backwards, over p stages and m microbatches (Huang et al. 2019).

    Every rank holds the activations of all m microbatches at the turn.
    """
    return _family(p, 1, m, [m], lambda _: m)


def one_f_one_b(p: int, m: int) -> Schedule:
    """One forward, one backward in turn, after a warm-up (PipeDream-flush, Narayanan et al. 2021).

    The bubble of GPipe, but rank r holds the activations of at most p - r microbatches.
    """
    return _family(p, 1, m, [m], lambda r: p - r - 1)


def looped_bfs(p: int, v: int, m: int) -> Schedule:
    """GPipe over v stages a rank, each with all microbatches before the next (Lamy-Poirier 2022, breadth-first).

    A v-th of GPipe's bubble; every rank holds all m * v activations at the turn. Parameters are needed once forward and
    once back, which is what sharded ones want.
    """
    return _family(p, v, m, [m], lambda _: v * m)


def interleaved(p: int, v: int, m: int, group: int | None = None) -> Schedule:
    """1F1B over v stages a rank, microbatches in groups (Narayanan et al. 2021, section 2.2).

    A v-th of the bubble of 1F1B, for 2 (p - r - 1) + (v - 1) group + 1 activations of a stage on rank r. `group` is the
    number of microbatches that pass a stage before the next one of the rank begins; at least p leaves no gaps. By
    default m // p groups as equal as can be, the larger ones first, so that any m will do.
    """
    sizes = _groups(p, m, group)
    return _family(p, v, m, sizes, lambda r: 2 * (p - r - 1) + (v - 1) * sizes[0] if v > 1 else p - r - 1)


def depth_first(p: int, v: int, m: int) -> Schedule:
    """`interleaved` in groups of exactly p, the last one with gaps (Lamy-Poirier 2022, depth-first)."""
    return interleaved(p, v, m, group=p)


def zb_h1(p: int, m: int) -> Schedule:
    """1F1B with split backwards: a third of its bubble where F, I and W take equally long, and no more memory.

    Qi et al. 2023, ZB-H1: W is deferred by r microbatches on rank r, so that each rank holds at most p activations.
    """
    return _family(p, 1, m, [m], lambda r: p - r - 1, lambda r: r)


def zb_h2(p: int, m: int) -> Schedule:
    """No bubble where F, I and W take equally long, but for the skew between the ranks; up to 2p - 1 activations.

    Qi et al. 2023, ZB-H2: twice the warm-up of 1F1B, and W deferred by twice as much.
    """
    return _family(p, 1, m, [m], lambda r: 2 * (p - r - 1), lambda r: 2 * r)


def interleaved_zb(p: int, v: int, m: int, group: int | None = None) -> Schedule:
    """`interleaved` with split backwards: W deferred by r on rank r, and half the stagger of its warm-up.

    An I takes half as long as a backward, so that the first gradient needs p - r - 1 forwards more, not twice as many;
    every rank holds at most (v - 1) group + p activations.
    """
    sizes = _groups(p, m, group)
    return _family(p, v, m, sizes, lambda r: p - r - 1 + (v - 1) * sizes[0], lambda r: r)


def forward_only(p: int, m: int, place: tuple[int, ...] | None = None) -> Schedule:
    """Every microbatch forward through all stages, none back: evaluation. `lower` it; `check` would miss backwards."""
    place = placement(p) if place is None else place
    stages = [np.array([s for s, rank in enumerate(place) if rank == r]) for r in range(p)]
    return Schedule(place, m, [encode(np.tile(s, m), F, np.repeat(np.arange(m), len(s))) for s in stages])


def _groups(p: int, m: int, group: int | None) -> list[int]:
    if group is None:
        return [len(part) for part in np.array_split(np.arange(m), max(1, m // p))]
    if group < 1:
        raise ValueError(f"groups of {group} microbatches: at least 1")
    return [group] * -(-m // group)


def _family(
    p: int,
    v: int,
    m: int,
    groups: list[int],
    warmup: Callable[[int], int],
    delay: Callable[[int], int] | None = None,
) -> Schedule:
    """The rule at the top of this file; `groups` are sizes, not increasing, and those beyond m are not there.

    What is left of an order that can happen can happen.
    """
    ends = np.cumsum(groups)
    turns = [np.arange(end - size, end) for size, end in zip(groups, ends, strict=True)]
    turn = np.concatenate([np.repeat(np.arange(v), len(mbs)) for mbs in turns])  # of v through the pipeline
    mb = np.concatenate([np.tile(mbs, v) for mbs in turns])
    k = np.arange(len(mb))
    orders: list[Ints] = []
    for r in range(p):
        ahead, back = min(warmup(r), len(mb)), (v - 1 - turn) * p + r
        columns = [(encode(turn * p + r, F, mb), 4 * k)]
        columns.append((encode(back, B if delay is None else I, mb), 4 * (ahead + k) + 1))
        if delay is not None:
            columns.append((encode(back, W, mb), 4 * (ahead + k + delay(r)) + 2))
        codes, keys = (np.concatenate(parts) for parts in zip(*columns, strict=True))
        codes = codes[np.argsort(keys)]
        orders.append(codes[mbs_of(codes) < m])
    return Schedule(placement(p, v), m, orders)
