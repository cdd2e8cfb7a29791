"""Sums whose association is fixed: a tree over terms, which gives the same bits wherever the terms lie.

Of n terms the left branch has the largest power of two that is smaller than n: ((a b) (c d)) ((e f) g). So whoever has
an aligned block of terms, as many as a power of two, has a node of the tree, and the tree over such nodes is the tree
over all terms: 8 terms on one rank, 4 on each of two and 1 on each of eight add up to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stretto.world import Axis

# torch 2.13 renamed these two and warns of the names that torch 2.11 has.
all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_WHOLE = 2**16
"""Elements up to which each rank gathers all terms of an all-reduce, in one exchange, and adds them itself."""


def tree_sum(terms: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape."""
    return tree_of(terms.__getitem__, len(terms))


def tree_of(term: Callable[[int], Tensor], n: int, first: int = 0) -> Tensor:
    """The sum of `term(first)`..`term(first + n - 1)`, each made when it is added: 1 + log2(n) exist at once."""
    if n == 1:
        return term(first)
    left = 1 << (n - 1).bit_length() - 1
    return tree_of(term, left, first) + tree_of(term, n - left, first + left)


def ordered_all_reduce_(x: Tensor, axis: Axis) -> None:
    """The sum of contiguous `x` over an axis of several ranks, in place."""
    flat = x.view(-1)
    if flat.numel() <= _WHOLE:
        flat.copy_(tree_sum(_gathered(flat, axis).chunk(axis.size)))
        return
    rows = -(-flat.numel() // axis.size)
    padded = flat.new_zeros(axis.size * rows)
    padded[: flat.numel()] = flat
    flat.copy_(_gathered(ordered_reduce_scatter(padded, axis), axis)[: flat.numel()])


def ordered_reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """This rank's chunk along dim 0 of the sum of contiguous `x` [n * size, ..] over an axis of several ranks."""
    terms = torch.empty_like(x)
    axis.tell("all_to_all", x)
    axis.timed(dist.all_to_all_single(terms, x, group=axis.group, async_op=True)).wait()
    return tree_sum(terms.chunk(axis.size))


def _gathered(x: Tensor, axis: Axis) -> Tensor:
    out = x.new_empty(axis.size * x.numel())
    axis.tell("all_gather", x)
    axis.timed(all_gather_single(out, x, group=axis.group, async_op=True)).wait()
    return out
