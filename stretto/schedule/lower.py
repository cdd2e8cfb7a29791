"""From order to program: insert the messages, and the three verbs of the weights.

All messages stand in one global order that every rank's list follows. So the k-th send from a to b always
meets the k-th receive of b from a, and no order of arrival can deadlock, not even if every send and every
receive blocked until its partner came: whichever message is next in the global order, both of its ranks
have nothing else before it.

The order is that of a simulation: a message stands where its producer ends. On the receiving rank that is
before any action still running then, so the receive is posted early and the transfer overlaps it.
"""

from __future__ import annotations

import numpy as np

from stretto.schedule.actions import RECV_B, RECV_F, SEND_B, SEND_F, B, F, I, Ints, encode
from stretto.schedule.costs import Cost
from stretto.schedule.ir import Schedule
from stretto.schedule.sharding import DDP, Sharding
from stretto.schedule.simulate import simulate
from stretto.schedule.weights import with_weights


def lower(s: Schedule, sharding: Sharding = DDP, cost: Cost | None = None) -> Schedule:
    """The program of a schedule: the same computation, with messages, UNSHARD, REDUCE and RESHARD.

    Where the verbs of the weights stand follows from `sharding`: see `with_weights`. `cost` decides the order of
    the messages. Raises `DeadlockError` if the schedule has one.
    """
    return with_weights(_with_messages(s, cost), sharding)


def _with_messages(s: Schedule, cost: Cost | None) -> Schedule:
    played, t = simulate(s, cost), s.table
    # The sort is stable and a timeline's order can happen: ties, even of actions that take no time, keep a
    # producer before its consumer.
    order = played.order[np.argsort(played.end[played.order], kind="stable")]
    place = np.empty(len(t), np.int64)
    place[order] = np.arange(len(t))
    codes, ranks, keys = [t.codes], [t.rank], [3 * place]
    home = np.asarray(s.placement)
    for ops, step, send, receive in (((F,), 1, SEND_F, RECV_F), ((B, I), -1, SEND_B, RECV_B)):
        to = np.clip(t.stage + step, 0, s.num_stages - 1)
        rows = np.flatnonzero(np.isin(t.op, ops) & (home[to] != t.rank))  # at the ends `to` is the stage itself
        codes += [encode(t.stage[rows], send, t.mb[rows]), encode(to[rows], receive, t.mb[rows])]
        ranks += [t.rank[rows], home[to[rows]]]
        keys += [3 * place[rows] + 1, 3 * place[rows] + 2]
    return rebuilt(s, np.concatenate(codes), np.concatenate(ranks), np.concatenate(keys))


def rebuilt(s: Schedule, codes: Ints, ranks: Ints, keys: Ints) -> Schedule:
    """The schedule with these actions on these ranks, each rank's in ascending order of their keys."""
    codes = codes[np.lexsort((keys, ranks))]
    ends = np.cumsum(np.bincount(ranks, minlength=s.num_ranks))[:-1]
    return Schedule(s.placement, s.num_microbatches, np.split(codes, ends))
