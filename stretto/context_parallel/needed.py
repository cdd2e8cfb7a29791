"""Keys and values go only to the ranks whose queries see them, by an uneven all-to-all; their gradients come back.

Structure says what each rank needs (`stretto.sequence.needed`), so all ranks know all sizes. As with an all-gather a
rank's own squares along the diagonal are computed meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stretto.collectives import all_to_all_rows_async
from stretto.context_parallel.exchange import Block, Gradients, Ranks, Sees
from stretto.context_parallel.parts import Total
from stretto.sequence import Tile, crossing, needed, tiles
from stretto.structure import Structure, to_device
from stretto.world import AsyncTensor, Axis, RowSplits

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """What goes where, of keys [n, b, ..] that are counted as [n * b, ..].

    `sent` are this rank's, in the order of the ranks that get them. `order` [m, b] is where the keys that are needed
    stand among this rank's and those that came behind them; a row that needs fewer has some key in its last places,
    which nobody sees. `came` is where those that came stand in `order`, counted likewise; `own` where this rank's do,
    and `kept` which these are.
    """

    splits: RowSplits
    tiles: Sequence[tuple[slice, Tile]]
    sent: Tensor
    order: Tensor
    came: Tensor
    own: Tensor
    kept: Tensor

    @classmethod
    def of(cls, structure: Structure, rank: int, window: int | None, device: torch.device) -> Plan:
        """For `rank`, one of several."""
        held, slots = structure.held, structure.slots
        every = [needed(each.runs, window) for each in held]
        ranks, b = len(held[0].runs), held[-1].rows.stop
        rows = [np.arange(each.rows.start, each.rows.stop) for each in held]
        pairs = np.sum([len(of) * crossing(each) for of, each in zip(rows, every, strict=True)], 0)
        order = np.zeros((max(len(each[rank].home) for each in every), b), np.int64)
        sent, came, own, kept = ([np.empty(0, np.int64)] for _ in range(4))
        behind = slots * b
        for other, (each, of) in product(range(ranks), zip(every, rows, strict=True)):
            theirs, mine = each[other], each[rank]
            # Here keys come first, then rows: of rows that are dealt alike a key's lie side by side.
            if other != rank:
                sent.append(_counted(theirs.slots[theirs.home == rank], of, b))
            at = np.flatnonzero(mine.home == other)
            places = _counted(at, of, b)
            if other == rank:
                kept.append(_counted(mine.slots[at], of, b))
                own.append(places)
                order.flat[places] = kept[-1]
            else:
                came.append(places)
                order.flat[places] = np.arange(behind, behind + len(places))
                behind += len(places)
        seen = [
            (each.rows, tile)
            for each, keys in zip(held, every, strict=True)
            for tile in tiles(each.runs[rank], keys[rank].runs, window, before=True)
        ]
        tensors = (to_device(torch.from_numpy(np.concatenate(x)), device) for x in (sent, [order], came, own, kept))
        return cls(RowSplits.of_pairs(pairs.tolist(), rank), seen, *tensors)

    def gathered(self, kv: Tensor, came: Tensor) -> Tensor:
        """The keys that are needed [m, b, ..], of this rank's [n, b, ..] and those that came."""
        every = torch.cat([kv.flatten(0, 1), came])
        del came
        return every.index_select(0, self.order.flatten()).view(*self.order.shape, *kv.shape[2:])


@dataclass(frozen=True)
class NeededKeys:
    """The keys that are needed come at once, and their gradients go home the same way.

    A rank adds what comes to its own in the order of the ranks, so sums are the same each time. Each source is a single
    rank of cp.
    """

    axis: Axis
    sources: tuple[Ranks, ...]
    window: int | None

    def blocks(self, kv: Tensor, structure: Structure, sees: Sees) -> Iterator[Block]:
        """As `Exchange`."""
        plan, coming = self._begun(kv, structure)
        yield Block(kv, sees(self.sources[self.axis.rank], "square"))
        yield Block(plan.gathered(kv, coming.pop().wait()), plan.tiles)

    def gradients(self, kv: Tensor, structure: Structure, sees: Sees) -> Gradients:
        """As `Exchange`; some squares while keys come, the others while gradients leave."""
        own, squares = Total(kv), sees(self.sources[self.axis.rank], "square")
        plan, coming = self._begun(kv, structure)
        yield Block(kv, squares[: len(squares) // 2], own)
        keys = plan.gathered(kv, coming.pop().wait())
        total = Total(keys)
        yield Block(keys, plan.tiles, total)
        whole = total.result().flatten(0, 1)
        # A peer buffer has room for keys, not for as many numbers of fp32: so they leave some heads at a time.
        parts = 1 if self.axis.peer_buffer is None else whole.element_size() // kv.element_size()
        back = plan.splits.back
        leaving = [all_to_all_rows_async(part, back, self.axis, plan.came) for part in whole.chunk(parts, 1)]
        kept = whole.index_select(0, plan.own)
        del keys, total, whole
        yield Block(kv, squares[len(squares) // 2 :], own)
        dkv = own.result()
        rows = dkv.flatten(0, 1).index_add_(0, plan.kept, kept)
        for part, others in zip(rows.chunk(len(leaving), 1), leaving, strict=True):
            places, gradients = (torch.split(x, list(plan.splits.sent)) for x in (plan.sent, others.wait()))
            for at, of_rank in zip(places, gradients, strict=True):  # a key may have one of each rank
                part.index_add_(0, at, of_rank)
        return dkv

    def _begun(self, kv: Tensor, structure: Structure) -> tuple[Plan, list[AsyncTensor]]:
        key, rank = ("needed", self.sources, self.window, kv.device), self.sources[self.axis.rank][0]
        plan = structure.known(key, lambda: Plan.of(structure, rank, self.window, kv.device))
        return plan, [all_to_all_rows_async(kv.flatten(0, 1), plan.splits, self.axis, plan.sent)]


def _counted(keys: Ints, rows: Ints, b: int) -> Ints:
    return (keys[:, None] * b + rows).flatten()
