"""Attention of rows that are dealt to the ranks of cp: heads or keys go where they are needed.

    all-gather   every rank gets all keys and values; their gradients are reduced and scattered
    needed       every rank gets the keys and values that its queries see; their gradients come back the same way
    ring         keys and values go round, and their gradients behind them (Liu et al., "Ring attention", 2023)
    ulysses      an all-to-all gives every rank some heads of the whole row (Jacobs et al., "DeepSpeed Ulysses", 2023)
    hybrid       ulysses among neighbours, a ring between these groups (Fang and Zhao, "USP", 2024)

All of them are one thing: heads are exchanged over `inner`, keys over `outer`, and what a rank then sees is tiles. With
one rank on both, that is attention of rows with several documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stretto.attention import PLAIN, Attend, Scores
from stretto.attention.tile import TileKernel
from stretto.collectives import all_to_all
from stretto.context_parallel.exchange import AllGather, Block, Exchange, Ordered, Ranks, Ring, Sees
from stretto.context_parallel.merge import Merge, merge_
from stretto.context_parallel.needed import NeededKeys
from stretto.context_parallel.parts import Combine, Parts, add, split
from stretto.sequence import Tile, Which
from stretto.structure import Structure
from stretto.world import Axis

Comm = Literal["all-gather", "needed", "ring", "ulysses", "hybrid"]
Way = Literal["all-gather", "needed", "ring"]
"""How keys and values come."""


@dataclass(frozen=True)
class ContextAttention:
    """An `Attend` over the ranks of `inner` x `outer`, neighbours along `inner`; plain rows go to `plain`.

    `merge` computes what `merge_` says.
    """

    plain: Attend
    kernel: TileKernel
    inner: Axis
    outer: Axis
    way: Way
    merge: Combine = merge_

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scores: Scores = PLAIN,
        structure: Structure | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """[b, heads, n, d] of q and [b, kv_heads, n, d] of k and v, of this rank's slots -> [b, heads, n, d]."""
        if structure is None or structure.plain:
            # Without sinks, by the quickest kernels that there are; those with an LSE take them.
            return self.plain(q, k, v, scores, structure) if sinks is None else self._whole(q, k, v, scores, sinks)
        a = self.inner.size
        if q.shape[1] % a:
            raise ValueError(f"{q.shape[1]} heads on a rank are not a multiple of the {a} ranks of {self.inner}")
        if (short := k.shape[-1] - v.shape[-1]) > 0:  # keys and values travel as one: what is added stays zero
            return self(q, k, F.pad(v, (0, short)), scores, structure, sinks)[..., : v.shape[-1]]
        kv_heads = k.shape[1]
        # Fewer key/value heads than ranks: as many copies as it takes, whose gradients add up.
        copies = a // gcd(kv_heads, a)
        q, k, v = (x.permute(2, 0, 1, 3) for x in (q, k, v))
        kv = torch.stack([x.repeat_interleave(copies, 2) if copies > 1 else x for x in (k, v)], 3).flatten(2, 3)
        own = self.sources[self.outer.rank]
        heads, keys = self._to_heads(q, structure, own), self._to_heads(kv, structure, own)
        exchange = self._exchange(scores)
        mine = None if sinks is None else sinks.chunk(a)[self.inner.rank]
        call = _Call(self.kernel, self.merge, exchange, structure, scores, partial(_seen, structure, own, scores))
        y: Tensor = _Tiles.apply(heads, keys, mine, call)  # type: ignore[no-untyped-call]
        return self._from_heads(y, structure, own)

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores, sinks: Tensor) -> Tensor:
        """Of plain rows, whose last n positions the queries are: one tile."""
        n, m, width = q.shape[2], k.shape[2], v.shape[-1]
        v = F.pad(v, (0, k.shape[-1] - width))
        one = Axis.single("cp")
        rows = [(slice(None), Tile(slice(0, n), slice(0, m), m - n, scores.window))]
        exchange = AllGather(one, ((0,),))
        call = _Call(self.kernel, self.merge, exchange, Structure.of_tokens(m), scores, lambda *_: rows)
        q, k, v = (x.permute(2, 0, 1, 3) for x in (q, k, v))
        y: Tensor = _Tiles.apply(q, torch.stack([k, v], 3).flatten(2, 3), sinks, call)  # type: ignore[no-untyped-call]
        return y.permute(1, 2, 0, 3)[..., :width]

    @property
    def sources(self) -> tuple[Ranks, ...]:
        """The ranks of cp that each of `outer` has the row of, after heads are exchanged."""
        a = self.inner.size
        return tuple(tuple(range(j * a, (j + 1) * a)) for j in range(self.outer.size))

    def _exchange(self, scores: Scores) -> Exchange:
        if self.way == "needed":
            return NeededKeys(self.outer, self.sources, scores.window)
        return Ring(self.outer, self.sources) if self.way == "ring" else AllGather(self.outer, self.sources)

    def _to_heads(self, x: Tensor, structure: Structure, own: Ranks) -> Tensor:
        """[n, b, heads, d] -> [a n, b, heads/a, d], in the order of the row."""
        x = all_to_all(x, self.inner, split_dim=2, concat_dim=0)
        return Ordered.apply(x, structure, own, False) if self.inner.size > 1 else x  # type: ignore[no-untyped-call]

    def _from_heads(self, y: Tensor, structure: Structure, own: Ranks) -> Tensor:
        """The way back, to [b, heads, n, d]."""
        if self.inner.size > 1:
            y = Ordered.apply(y, structure, own, True)  # type: ignore[no-untyped-call]
        return all_to_all(y, self.inner, split_dim=0, concat_dim=2).permute(1, 2, 0, 3)


def _seen(structure: Structure, own: Ranks, scores: Scores, ranks: Ranks, which: Which) -> Sequence[tuple[slice, Tile]]:
    return structure.tiles(own, ranks, scores.window, which)


@dataclass(frozen=True)
class _Call:
    kernel: TileKernel
    merge: Combine
    exchange: Exchange
    structure: Structure
    scores: Scores
    sees: Sees

    def parts(self, block: Block) -> Iterator[tuple[slice, Tile]]:
        """The tiles that the kernel is asked for."""
        return ((rows, part) for rows, tile in block.tiles for part in self.kernel.parts(tile))


class _Tiles(Function):
    """q [n, b, heads, d]; kv [m, b, 2 kv_heads, d], each key head beside its value head; sinks [heads] -> as q."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, sinks: Tensor | None, at: _Call) -> Tensor:
        queries = q.permute(1, 2, 0, 3)
        merge = Merge(queries, at.merge)
        for block in at.exchange.blocks(kv.contiguous(), at.structure, at.sees):
            k, v = split(block.kv)
            for rows, tile in at.parts(block):
                y, lse = at.kernel.forward(
                    queries[rows, :, tile.query], k[rows, :, tile.key], v[rows, :, tile.key], tile, at.scores
                )
                merge.add(rows, tile.query, y, lse)
        y, lse = merge.result(sinks)
        ctx.at = at
        ctx.save_for_backward(q, kv, y, lse, sinks)
        return y.permute(2, 0, 1, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        q, kv, y, lse, sinks = ctx.saved_tensors
        at: _Call = ctx.at
        queries, dout = q.permute(1, 2, 0, 3), dy.permute(1, 2, 0, 3)
        dqs = Parts(queries, add)
        coming = at.exchange.gradients(kv.contiguous(), at.structure, at.sees)
        while True:
            try:
                block = next(coming)
            except StopIteration as end:
                dkv: Tensor = end.value
                break
            assert block.total is not None
            k, v = split(block.kv)
            for rows, tile in at.parts(block):
                of, to = (rows, slice(None), tile.query), (rows, slice(None), tile.key)
                dq, dk, dv = at.kernel.backward(dout[of], queries[of], k[to], v[to], y[of], lse[of], tile, at.scores)
                dqs.add(rows, tile.query, dq)
                block.total.add(rows, tile.key, dk, dv)
        whole = torch.empty_like(q, memory_format=torch.contiguous_format)
        dqs.into(whole.permute(1, 2, 0, 3), empty=(0.0,))
        dsinks = None
        if sinks is not None:  # its value is zero, so what it gets is what its weight takes from the others
            lost = torch.exp(sinks.to(lse.dtype)[:, None] - lse) * (dout.to(lse.dtype) * y.to(lse.dtype)).sum(-1)
            dsinks = -lost.sum((0, 2)).to(sinks.dtype)
        return whole, dkv.to(kv.dtype), dsinks, None
