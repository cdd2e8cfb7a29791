"""Schedules of two stages a rank in the shape of a V: memory is the same on all ranks, and it is a choice.

Qi et al. 2024, "Pipeline Parallelism with Controllable Memory": a *building block* is one microbatch's way through the
pipeline, at times counted in forwards; a schedule repeats it every 6, in which a rank has its 2 F, 2 I and 2 W. How
fast the block climbs and descends says how long activations live, so how many there are.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from stretto.layout.stages import placement
from stretto.schedule.actions import B, F, I, Ints, W, encode, mbs_of
from stretto.schedule.greedy import squeeze
from stretto.schedule.ir import Schedule

_PERIOD = 6


def v_min(p: int, m: int) -> Schedule:
    """A third of the activations of 1F1B, for two thirds of its bubble where F, I and W take equally long.

    The block passes every rank at full speed; at most (p + 4) // 3 microbatches' activations (two stages each).
    """
    return _squeezed(p, m, (1, 1, 1, 1), (p + 4) // 3)


def v_half(p: int, m: int) -> Schedule:
    """Half the activations of 1F1B, for half of its bubble where F, I and W take equally long.

    At most (p + 2) // 2 microbatches' activations (two stages each).
    """
    return _squeezed(p, m, (1, 2, 1, 2), (p + 2) // 2)


def zbv(p: int, m: int) -> Schedule:
    """No bubble where F, I and W take equally long, but for the skew of p - 1 between the ranks; p activations.

    ZB-V (Qi et al. 2023), V-ZB of the family.
    """
    return _squeezed(p, m, (1, 5, 1, 2), p)


def _squeezed(p: int, m: int, slopes: tuple[int, int, int, int], most: int) -> Schedule:
    """The block of these slopes, squeezed to at most 2 * `most` activations of a stage."""
    return squeeze(repeated(p, m, slopes), cap=[2 * most] * p)


def repeated(p: int, m: int, slopes: tuple[int, int, int, int]) -> Schedule:
    """The block of these slopes for every microbatch, in the order of its times. Raises ValueError if none is."""
    f1, f2, i2, i1, w2, w1 = _block(p, slopes)
    mb = np.arange(m)
    orders: list[Ints] = []
    for r in range(p):
        up, down = r, 2 * p - 1 - r
        verbs = ((up, F, f1), (down, F, f2), (down, I, i2), (up, I, i1), (down, W, w2), (up, W, w1))
        codes = np.concatenate([encode(stage, op, mb) for stage, op, _ in verbs])
        keys = np.concatenate([at[r] + _PERIOD * mb for _, _, at in verbs])
        orders.append(codes[np.argsort(keys)])
    return Schedule(placement(p, 2, "v"), m, orders)


def _block(p: int, slopes: tuple[int, int, int, int]) -> tuple[Ints, ...]:
    """When each rank has F and F, I and I, W and W of one microbatch, no two of which meet when it is repeated.

    `slopes` is by how much the next rank is later: on the way down, up, and back both ways. The block rests as little
    as possible at its three turns.
    """
    r, back = np.arange(p), np.arange(p)[::-1]
    for rests in sorted(product(range(1, _PERIOD + 1), repeat=3), key=sum):
        f1 = slopes[0] * r
        f2 = f1[-1] + rests[0] + slopes[1] * back
        i2 = f2[0] + rests[1] + slopes[2] * r
        i1 = i2[-1] + rests[2] + slopes[3] * back
        times = np.stack([f1, f2, i2, i1])
        if (np.diff(np.sort(times % _PERIOD, axis=0), axis=0) > 0).all():
            w2, w1 = np.array([_free(times[:, rank]) for rank in range(p)]).T
            return f1, f2, i2, i1, w2, w1
    raise ValueError(f"no building block of slopes {slopes} for {p} ranks")


def _free(times: Ints) -> tuple[int, int]:
    """The first free times of the period after each I, for its W."""
    free = set(range(_PERIOD)) - set((times % _PERIOD).tolist())
    w2 = next(t for t in range(int(times[2]) + 1, int(times[2]) + 1 + _PERIOD) if t % _PERIOD in free)
    free.remove(w2 % _PERIOD)
    return w2, next(t for t in range(int(times[3]) + 1, int(times[3]) + 1 + _PERIOD) if t % _PERIOD in free)


def dualpipev(p: int, m: int) -> Schedule:
    """DualPipe folded into a V (DeepSeek-AI 2025; the half of it that holds each parameter once), over p ranks.

    In the middle a forward of one stage and a backward of the other stand side by side, for communication inside them
    to overlap. Backwards are whole but where W fills a gap. Made for m >= 2 p; a smaller m is what is left of that.
    """
    full = max(m, 2 * p)
    orders = [_dual_rank(p, r, full) for r in range(p)]
    return Schedule(placement(p, 2, "v"), m, [order[mbs_of(order) < m] for order in orders])


def _dual_rank(p: int, r: int, m: int) -> Ints:
    after, tail = p - r - 1, r + 1
    codes: list[Ints] = []
    done = {(stage, op): 0 for stage in (r, 2 * p - 1 - r) for op in (F, B)}
    owed: list[tuple[int, int]] = []

    def run(*verbs: tuple[int, int]) -> None:
        """Each with the next microbatch of its stage and direction; I leaves a W owed, and W pays the oldest."""
        for turn, op in verbs:
            stage = 2 * p - 1 - r if turn else r
            if op == W:
                codes.append(encode(owed[0][0], W, owed.pop(0)[1]))
                continue
            mb = done[stage, F if op == F else B]
            done[stage, F if op == F else B] = mb + 1
            codes.append(encode(stage, op, mb))
            if op == I:
                owed.append((stage, mb))

    for times, verbs in (
        (2 * after, [(0, F)]),
        (tail, [(0, F), (1, F)]),
        (after, [(1, I), (1, W), (1, F)]),
        (m - 2 * p + tail, [(0, F), (1, B), (1, F), (0, B)]),
        (after, [(1, B), (1, F), (0, B)]),
    ):
        for _ in range(times):
            run(*verbs)
    for k in range(2 * tail):  # the second half of these leaves its W for the gaps that follow
        run((1 - k % 2, I if k >= tail else B))
    for _ in range(after):
        run((0, W), (0, I))
    for _ in range(tail):
        run((0, W))
    return np.array(codes, np.int64)
