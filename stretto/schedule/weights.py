"""Where the three verbs of the weights stand in a program: the whole interface to sharded data parallelism."""

from __future__ import annotations

import numpy as np

from stretto.schedule.actions import REDUCE, RESHARD, UNSHARD, B, F, I, Ints, W, encode, ops_of, stages_of
from stretto.schedule.ir import Order, Schedule
from stretto.schedule.sharding import Sharding


def with_weights(s: Schedule, sharding: Sharding) -> Schedule:
    """The program with UNSHARD, RESHARD and REDUCE, as `sharding` says.

    A *visit* of a stage is a run of its F, B and I for which its parameters are whole: from its UNSHARD, which stands
    `sharding.ahead` computations of the rank before the first of them, to its RESHARD directly after the last. With
    whole parameters, or `keep=None`, a stage has one visit, else a new one wherever more than `keep` computations of
    other stages lie between two uses. REDUCE stands directly before the last B or W, or with
    `reduce_each` before each. W uses no parameters.
    """
    return Schedule(s.placement, s.num_microbatches, [_rank(order, sharding) for order in s.ranks])


def _rank(order: Order, sharding: Sharding) -> Ints:
    codes = order.codes
    stage, op = stages_of(codes), ops_of(codes)
    computes = np.flatnonzero(op <= W)
    number = np.cumsum(op <= W) - 1
    added, keys, ties = [codes], [4 * np.arange(len(codes)) + 2], [np.zeros(len(codes), np.int64)]
    for index in np.unique(stage).tolist():
        uses = np.flatnonzero((stage == index) & ((op == F) | (op == B) | (op == I)))
        if not len(uses):
            continue
        apart = np.diff(number[uses]) - 1
        cut = apart > (len(codes) if sharding.keep is None or not sharding.params else sharding.keep)
        first, last = uses[np.r_[True, cut]], uses[np.r_[cut, True]]
        visit = np.arange(len(first))
        # Not before the RESHARD of the visit before: that one ends at computation number[last].
        earliest = np.r_[0, number[last[:-1]] + 1]
        begin = np.maximum(number[first] - sharding.ahead, earliest)
        added.append(encode(index, UNSHARD, visit))
        keys.append(np.where(begin == 0, -1, 4 * computes[begin]))
        ties.append(first)  # of UNSHARDs at one position, that of the stage used first comes first
        if sharding.params:
            added.append(encode(index, RESHARD, visit))
            keys.append(4 * last + 3)
            ties.append(visit)
        gradients = np.flatnonzero((stage == index) & ((op == B) | (op == W)))
        if not sharding.reduce_each:
            gradients = gradients[-1:]
        added.append(encode(index, REDUCE, np.arange(len(gradients))))
        keys.append(4 * gradients + 1)
        ties.append(gradients)
    every = np.concatenate(added)
    return every[np.lexsort((np.concatenate(ties), np.concatenate(keys)))]
