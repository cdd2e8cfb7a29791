"""How keys and values of other ranks come, and how their gradients go home.

Tensors are [n, b, 2 kv_heads, d]: keys and values side by side, sequence first. Each way gives the blocks of keys one
after another, with the ranks that they are of; in the backward also a place for the block's gradient in fp32 or wider.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from stretto.collectives import all_gather_async, reduce_scatter_async, shift_async
from stretto.structure import Structure
from stretto.world import Axis

Ranks = tuple[int, ...]
"""Ranks of the whole cp axis."""

Gradients = Generator[tuple[Ranks, Tensor, Tensor], None, Tensor]
"""Blocks with places for their gradients; and the gradient of what this rank has."""


class Exchange(Protocol):
    """Over the ranks of an axis; `sources[i]` are the ranks of cp whose keys the i-th of them has."""

    def blocks(self, kv: Tensor, structure: Structure) -> Iterator[tuple[Ranks, Tensor]]:
        """Each block once."""

    def gradients(self, kv: Tensor, structure: Structure) -> Gradients:
        """Each block once more, with zeros (or what others added) to which its gradient is to be added in place.

        What the generator returns is the gradient of `kv`, summed over all ranks.
        """


@dataclass(frozen=True)
class AllGather:
    """All keys come at once, in the order of the row; gradients go home by a reduce-scatter.

    Each source is a single rank of cp, where there are several.
    """

    axis: Axis
    sources: tuple[Ranks, ...]

    def blocks(self, kv: Tensor, structure: Structure) -> Iterator[tuple[Ranks, Tensor]]:
        """As `Exchange`."""
        yield self._every, self._ordered(all_gather_async(kv, self.axis).wait(), structure)

    def gradients(self, kv: Tensor, structure: Structure) -> Gradients:
        """As `Exchange`."""
        whole = self._ordered(all_gather_async(kv, self.axis).wait(), structure)
        total = torch.zeros_like(whole, dtype=torch.promote_types(kv.dtype, torch.float32))
        yield self._every, whole, total
        if self.axis.size > 1:
            total = _unordered(total, structure, self._every)
        return reduce_scatter_async(total, self.axis).wait()

    @property
    def _every(self) -> Ranks:
        return tuple(rank for ranks in self.sources for rank in ranks)

    def _ordered(self, x: Tensor, structure: Structure) -> Tensor:
        # What one rank has lies in the order of the row already, of however many ranks of cp it is.
        return _ordered(x, structure, self._every) if self.axis.size > 1 else x


@dataclass(frozen=True)
class Ring:
    """Each rank passes on to the next what it has; the next block is on its way while this one is used.

    Gradients travel behind their block, each rank adds to them, and the last step brings them home.
    """

    axis: Axis
    sources: tuple[Ranks, ...]

    def blocks(self, kv: Tensor, structure: Structure) -> Iterator[tuple[Ranks, Tensor]]:
        """As `Exchange`."""
        del structure  # each block lies in the order of the row already
        n, here = self.axis.size, self.axis.rank
        for step in range(n):
            coming = shift_async(kv, self.axis) if step < n - 1 else None
            yield self.sources[(here - step) % n], kv
            kv = kv if coming is None else coming.wait()

    def gradients(self, kv: Tensor, structure: Structure) -> Gradients:
        """As `Exchange`."""
        del structure
        n, here = self.axis.size, self.axis.rank
        wide = torch.promote_types(kv.dtype, torch.float32)
        behind = None
        for step in range(n):
            coming = shift_async(kv, self.axis) if step < n - 1 else None
            own = torch.zeros_like(kv, dtype=wide)
            yield self.sources[(here - step) % n], kv, own
            # What the ranks before added comes while this rank computes its own.
            total = own if behind is None else own.add_(behind.wait())
            behind = shift_async(total, self.axis)
            kv = kv if coming is None else coming.wait()
        assert behind is not None
        return behind.wait()


def exchange_over(axis: Axis, sources: tuple[Ranks, ...], way: Literal["all-gather", "ring"]) -> Exchange:
    """By its name."""
    return Ring(axis, sources) if way == "ring" else AllGather(axis, sources)


def _ordered(x: Tensor, structure: Structure, ranks: Ranks) -> Tensor:
    """x [ranks * n, b, ..] in the order of the row."""
    if len(ranks) == 1:  # a rank's own slots are
        return x
    order = structure.order(ranks, x.device)
    if order.shape[1] == 1:
        return x.index_select(0, order[:, 0])
    return x[order, torch.arange(x.shape[1], device=x.device)]


def _unordered(x: Tensor, structure: Structure, ranks: Ranks) -> Tensor:
    """The other way round."""
    if len(ranks) == 1:
        return x
    order, out = structure.order(ranks, x.device), torch.empty_like(x)
    if order.shape[1] == 1:
        return out.index_copy_(0, order[:, 0], x)
    out[order, torch.arange(x.shape[1], device=x.device)] = x
    return out


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
