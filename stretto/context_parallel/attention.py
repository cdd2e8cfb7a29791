"""Attention of rows that are dealt to the ranks of cp: heads or keys go where they are needed.

    all-gather   every rank gets all keys and values; their gradients are reduced and scattered
    ring         keys and values go round, and their gradients behind them (Liu et al., "Ring attention", 2023)
    ulysses      an all-to-all gives every rank some heads of the whole row (Jacobs et al., "DeepSpeed Ulysses", 2023)
    hybrid       ulysses among neighbours, a ring between these groups (Fang and Zhao, "USP", 2024)

All of them are one thing: heads are exchanged over `inner`, keys over `outer`, and what a rank then sees is tiles. With
one rank on both, that is attention of rows with several documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from stretto.context_parallel.exchange import AllGather, Exchange, Ordered, Ranks, exchange_over
from stretto.context_parallel.merge import Merge
from stretto.sequence import Tile
from stretto.structure import Structure
from stretto.world import Axis

Comm = Literal["all-gather", "ring", "ulysses", "hybrid"]


@dataclass(frozen=True)
class ContextAttention:
    """An `Attend` over the ranks of `inner` x `outer`, neighbours along `inner`; plain rows go to `plain`."""

    plain: Attend
    kernel: TileKernel
    inner: Axis
    outer: Axis
    way: Literal["all-gather", "ring"]

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
        kv = torch.stack([x.repeat_interleave(copies, 1) if copies > 1 else x for x in (k, v)], 2)
        own = self.sources[self.outer.rank]
        heads = self._to_heads(q, structure, own)
        keys = self._to_heads(kv.flatten(1, 2), structure, own)
        exchange = exchange_over(self.outer, self.sources, self.way)
        mine = None if sinks is None else sinks.chunk(a)[self.inner.rank]
        call = _Call(self.kernel, exchange, structure, scores, partial(structure.tiles, own, window=scores.window))
        y: Tensor = _Tiles.apply(heads, keys, mine, call)  # type: ignore[no-untyped-call]
        return self._from_heads(y, structure, own)

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores, sinks: Tensor) -> Tensor:
        """Of plain rows, whose last n positions the queries are: one tile."""
        n, m, width = q.shape[2], k.shape[2], v.shape[-1]
        v = F.pad(v, (0, k.shape[-1] - width))
        one = Axis.single("cp")
        rows = [(slice(None), Tile(slice(0, n), slice(0, m), m - n, scores.window))]
        call = _Call(self.kernel, AllGather(one, ((0,),)), Structure.of_tokens(m), scores, lambda _: rows)
        kv = torch.stack([k, v], 2).flatten(1, 2).permute(2, 0, 1, 3)
        y: Tensor = _Tiles.apply(q.permute(2, 0, 1, 3), kv, sinks, call)  # type: ignore[no-untyped-call]
        return y.permute(1, 2, 0, 3)[..., :width]

    @property
    def sources(self) -> tuple[Ranks, ...]:
        """The ranks of cp that each of `outer` has the row of, after heads are exchanged."""
        a = self.inner.size
        return tuple(tuple(range(j * a, (j + 1) * a)) for j in range(self.outer.size))

    def _to_heads(self, x: Tensor, structure: Structure, own: Ranks) -> Tensor:
        """[b, heads, n, d] -> [a n, b, heads/a, d], in the order of the row."""
        x = all_to_all(x.permute(2, 0, 1, 3), self.inner, split_dim=2, concat_dim=0)
        return Ordered.apply(x, structure, own, False) if self.inner.size > 1 else x  # type: ignore[no-untyped-call]

    def _from_heads(self, y: Tensor, structure: Structure, own: Ranks) -> Tensor:
        """The way back."""
        if self.inner.size > 1:
            y = Ordered.apply(y, structure, own, True)  # type: ignore[no-untyped-call]
        return all_to_all(y, self.inner, split_dim=0, concat_dim=2).permute(1, 2, 0, 3)


@dataclass(frozen=True)
class _Call:
    kernel: TileKernel
    exchange: Exchange
    structure: Structure
    scores: Scores
    tiles: Callable[[Ranks], Sequence[tuple[slice, Tile]]]
    """By whose keys are seen."""

    def parts(self, ranks: Ranks) -> Iterator[tuple[slice, Tile]]:
        """The tiles that the kernel is asked for."""
        return ((rows, part) for rows, tile in self.tiles(ranks) for part in self.kernel.parts(tile))


class _Tiles(Function):
    """q [n, b, heads, d]; kv [m, b, 2 kv_heads, d], each key head beside its value head; sinks [heads] -> as q."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, sinks: Tensor | None, at: _Call) -> Tensor:
        queries = q.permute(1, 2, 0, 3)
        merge = Merge(queries)
        for ranks, block in at.exchange.blocks(kv.contiguous(), at.structure):
            k, v = _split(block)
            for rows, tile in at.parts(ranks):
                y, lse = at.kernel.forward(
                    queries[rows, :, tile.query], k[rows, :, tile.key], v[rows, :, tile.key], tile, at.scores
                )
                merge.add(rows, tile.query, y, lse)
        y, lse = merge.result(q.dtype, sinks)
        ctx.at = at
        ctx.save_for_backward(q, kv, y, lse, sinks)
        return y.permute(2, 0, 1, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        q, kv, y, lse, sinks = ctx.saved_tensors
        at: _Call = ctx.at
        queries, dout = q.permute(1, 2, 0, 3), dy.permute(1, 2, 0, 3)
        dq = torch.zeros(queries.shape, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        coming = at.exchange.gradients(kv.contiguous(), at.structure)
        while True:
            try:
                ranks, block, total = next(coming)
            except StopIteration as end:
                dkv: Tensor = end.value
                break
            (k, v), (dk, dv) = _split(block), _split(total)
            for rows, tile in at.parts(ranks):
                of, to = (rows, slice(None), tile.query), (rows, slice(None), tile.key)
                made = at.kernel.backward(dout[of], queries[of], k[to], v[to], y[of], lse[of], tile, at.scores)
                for whole, where, part in ((dq, of, made[0]), (dk, to, made[1]), (dv, to, made[2])):
                    whole[where] += part.to(whole.dtype)
        dsinks = None
        if sinks is not None:  # its value is zero, so what it gets is what its weight takes from the others
            lost = torch.exp(sinks.to(lse.dtype)[:, None] - lse) * (dout.to(lse.dtype) * y.to(lse.dtype)).sum(-1)
            dsinks = -lost.sum((0, 2)).to(sinks.dtype)
        return dq.to(q.dtype).permute(2, 0, 1, 3), dkv.to(kv.dtype), dsinks, None


def _split(kv: Tensor) -> tuple[Tensor, Tensor]:
    """Views of keys and values [b, kv_heads, m, d]."""
    m, b, heads, d = kv.shape
    k, v = kv.view(m, b, heads // 2, 2, d).permute(3, 1, 2, 0, 4)
    return k, v
