"""How keys and values of other ranks come, and how their gradients go home.

Tensors are [n, b, 2 kv_heads, d]: keys and values side by side, sequence first. Each way gives the blocks of keys one
after another, with the tiles for which they are there; in the backward also a place for their gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stretto.collectives import all_gather_async, reduce_scatter_async, reduce_scatter_rows_async, shift_async
from stretto.context_parallel.parts import Total
from stretto.sequence import Tile, Which
from stretto.structure import Structure
from stretto.world import AsyncTensor, Axis

Ranks = tuple[int, ...]
"""Ranks of the whole cp axis."""

Sees = Callable[[Ranks, Which], Sequence[tuple[slice, Tile]]]
"""The tiles of this rank's queries and these ranks' keys, by rows."""


class Block(NamedTuple):
    """Keys and values [m, b, 2 kv_heads, d], in the order of the row, and the tiles for which they are here.

    In the backward `total` takes their gradient.
    """

    kv: Tensor
    tiles: Sequence[tuple[slice, Tile]]
    total: Total | None = None


Gradients = Generator[Block, None, Tensor]
"""Blocks with places for their gradients; and the gradient of what this rank has."""


class Exchange(Protocol):
    """Over the ranks of an axis; `sources[i]` are the ranks of cp whose keys the i-th of them has."""

    def blocks(self, kv: Tensor, structure: Structure, sees: Sees) -> Iterator[Block]:
        """Blocks whose tiles are, together, all that this rank's queries see."""

    def gradients(self, kv: Tensor, structure: Structure, sees: Sees) -> Gradients:
        """The same once more, each with a total to which its gradient is to be added.

        What the generator returns is the gradient of `kv`, summed over all ranks.
        """


@dataclass(frozen=True)
class AllGather:
    """All keys come at once, in the order of the row; gradients go home by a reduce-scatter.

    What a rank has itself is seen while the rest is on its way: the squares along the diagonal, whose queries and keys
    are the same tokens. Each source is a single rank of cp, where there are several.
    """

    axis: Axis
    sources: tuple[Ranks, ...]

    def blocks(self, kv: Tensor, structure: Structure, sees: Sees) -> Iterator[Block]:
        """As `Exchange`."""
        if self.axis.size == 1:
            yield Block(kv, sees(self._own, "all"))
            return
        coming = [all_gather_async(kv, self.axis)]
        yield Block(kv, sees(self._own, "square"))
        yield Block(_ordered(coming.pop().wait(), structure, self._every), sees(self._every, "before"))

    def gradients(self, kv: Tensor, structure: Structure, sees: Sees) -> Gradients:
        """As `Exchange`; some squares while keys come, the others while gradients leave."""
        own = Total(kv)
        if self.axis.size == 1:
            yield Block(kv, sees(self._own, "all"), own)
            return own.result()
        coming, squares = [all_gather_async(kv, self.axis)], sees(self._own, "square")
        yield Block(kv, squares[: len(squares) // 2], own)
        whole = _ordered(coming.pop().wait(), structure, self._every)
        total = Total(whole)
        yield Block(whole, sees(self._every, "before"), total)
        leaving = list(self._leave(total.result(), structure, kv))
        del whole, total
        yield Block(kv, squares[len(squares) // 2 :], own)
        dkv = own.result()
        for part, others in zip(dkv.chunk(len(leaving), 2), leaving, strict=True):
            part.add_(others.wait())
        return dkv

    def _leave(self, total: Tensor, structure: Structure, kv: Tensor) -> Iterator[AsyncTensor]:
        """Gradients of the keys of all ranks on their way to these.

        A peer buffer has room for keys, not for as many numbers of fp32: so they leave some heads at a time, each part
        put into the order of the ranks where it is read from.
        """
        parts, buffer = total.element_size() // kv.element_size(), self.axis.peer_buffer
        if self.axis.ordered or buffer is None or not buffer.takes(kv.nbytes):
            yield reduce_scatter_async(_unordered(total, structure, self._every), self.axis)
            return
        slots = structure.slots_of(self._every, kv.device).chunk(self.axis.size)
        for part in total.chunk(parts, 2):
            yield reduce_scatter_rows_async(partial(_rows, part, slots), part, self.axis)

    @property
    def _every(self) -> Ranks:
        return tuple(rank for ranks in self.sources for rank in ranks)

    @property
    def _own(self) -> Ranks:
        return self.sources[self.axis.rank]


@dataclass(frozen=True)
class Ring:
    """Each rank passes on to the next what it has; the next block is on its way while this one is used.

    Gradients travel behind their block, each rank adds to them, and the last step brings them home.
    """

    axis: Axis
    sources: tuple[Ranks, ...]

    def blocks(self, kv: Tensor, structure: Structure, sees: Sees) -> Iterator[Block]:
        """As `Exchange`."""
        del structure  # each block lies in the order of the row already
        n, here = self.axis.size, self.axis.rank
        for step in range(n):
            coming = shift_async(kv, self.axis) if step < n - 1 else None
            yield Block(kv, sees(self.sources[(here - step) % n], "all"))
            kv = kv if coming is None else coming.wait()

    def gradients(self, kv: Tensor, structure: Structure, sees: Sees) -> Gradients:
        """As `Exchange`."""
        del structure
        n, here = self.axis.size, self.axis.rank
        behind = None
        for step in range(n):
            coming = shift_async(kv, self.axis) if step < n - 1 else None
            total = Total(kv)
            yield Block(kv, sees(self.sources[(here - step) % n], "all"), total)
            # What the ranks before added comes while this rank computes its own.
            own = total.result()
            own = own if behind is None else own.add_(behind.wait())
            behind = shift_async(own, self.axis)
            kv = kv if coming is None else coming.wait()
        assert behind is not None
        return behind.wait()


def _ordered(x: Tensor, structure: Structure, ranks: Ranks) -> Tensor:
    """x [ranks * n, b, ..] in the order of the row; a rank's own slots are."""
    return x if len(ranks) == 1 else _picked(x, structure.order(ranks, x.device))


def _unordered(x: Tensor, structure: Structure, ranks: Ranks) -> Tensor:
    """The other way round."""
    return x if len(ranks) == 1 else _picked(x, structure.slots_of(ranks, x.device))


def _rows(x: Tensor, slots: Sequence[Tensor], rank: int, out: Tensor | None) -> Tensor:
    return _picked(x, slots[rank], out)


def _picked(x: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """x [m, b, ..] at `index` [n, b or 1]."""
    if index.shape[1] == 1:
        return torch.index_select(x, 0, index[:, 0], out=out)
    found = x[index, torch.arange(x.shape[1], device=x.device)]
    return found if out is None else out.copy_(found)


class Ordered(torch.autograd.Function):
    """x [ranks * n, b, ..], of several ranks one after another, in the order of the row; and back in the backward."""

    @staticmethod
    def forward(ctx: object, x: Tensor, structure: Structure, ranks: Ranks, back: bool) -> Tensor:
        ctx.at = structure, ranks, back  # type: ignore[attr-defined]
        return (_unordered if back else _ordered)(x, structure, ranks)

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> tuple[Tensor, None, None, None]:
        structure, ranks, back = ctx.at  # type: ignore[attr-defined]
        return (_ordered if back else _unordered)(dy.contiguous(), structure, ranks), None, None, None
