"""Rows to and from their tokens: what is moved once for each choice of an expert, as plain arithmetic.

`back` [etp, n, K] has for each assignment, token t and slot k, where its rows lie among those that are sent, one for
each part of a cut expert; beyond the last where the assignment was dropped. `order` [sent] is the way back: the
assignment t * K + k of each row. What comes back may be in two tensors, of which one goes on where the other ends. Sums
are in fp32 or wider, and in the order of the slots.

Rows are the most memory that a layer of experts moves, K times its input. On a GPU each of these is one kernel that
reads and writes a row once (`stretto.kernels.experts`); these formulas are what the kernels are held against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stretto.tensor_parallel import Build


def scatter_rows(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """Tokens x [n, h] to the rows [sent, h] of their assignments."""
    return x.index_select(0, order // back.shape[-1])


def sum_rows(rows: Tensor, more: Tensor | None, back: Tensor, beside: Tensor | None = None) -> Tensor:
    """[n, h]: the sum of each token's rows; the adjoint of `scatter_rows`. What is `beside` [n, h] is added to what is
    rounded, as if by itself."""
    total = _added(_joined(rows, more), back, None)
    return total if beside is None else total + beside


def combine_rows(rows: Tensor, more: Tensor | None, weights: Tensor, back: Tensor) -> Tensor:
    """[n, h]: the sum of each token's rows, times the weights [n, K] of its slots."""
    return _added(_joined(rows, more), back, weights)


def by_expert(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Of rows that lie by source, within it by expert, as `counts` [sources, experts] says: their order by expert
    [total], and its inverse."""
    begins = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts).t().flatten()
    ends = counts.t().flatten().cumsum(0)
    places = torch.arange(total, device=counts.device)
    part = torch.searchsorted(ends, places, right=True)
    order = places + (begins - ends + counts.t().flatten()).index_select(0, part)
    return order, torch.empty_like(order).scatter_(0, order, places)


def sort_assignments(keys: Tensor, number: int, dropped: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Assignments [m] by expert, within one as they are: their order [m] and its inverse; how many each of so many
    experts has, int64, and where those end, int32. Those of no expert, `number` where some are `dropped`, come last."""
    del dropped
    # The fewer bits, the fewer passes of a radix sort.
    sorted_keys, order = torch.sort(keys.to(torch.int16 if number < 2**15 else torch.int64), stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(keys), device=keys.device))
    experts = torch.arange(number, dtype=sorted_keys.dtype, device=keys.device)
    ends = torch.searchsorted(sorted_keys, experts, right=True)
    return order, places, torch.diff(ends, prepend=ends.new_zeros(1)), ends.to(torch.int32)


def of_slots(numbers: Tensor, more: Tensor | None, back: Tensor) -> Tensor:
    """[n, K]: of each slot the number [sent, 1] that came back for it; 0 where it was dropped."""
    if more is None and numbers.numel() == back.numel():  # each has one
        return numbers.view(-1).index_select(0, back.view(-1)).view(back.shape[1:])
    beyond = torch.cat([numbers, *(() if more is None else (more,)), numbers.new_zeros(1, 1)])[:, 0]
    return beyond.index_select(0, back.clamp(max=len(beyond) - 1).flatten()).view_as(back).sum(0)


def _joined(rows: Tensor, more: Tensor | None) -> Tensor:
    return rows if more is None else torch.cat([rows, more])


def _added(rows: Tensor, back: Tensor, weights: Tensor | None) -> Tensor:
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = torch.zeros((back.shape[1], rows.shape[1]), dtype=wide, device=rows.device)
    for k in range(back.shape[-1]):
        slot = _slot(rows, back, k, wide)
        total += slot if weights is None else slot * weights[:, k, None]
    return total.to(rows.dtype)


def _slot(rows: Tensor, back: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """[n, h]: what came back for slot k of each token, the parts of a cut expert added up; 0 where it was dropped."""
    found = torch.zeros((back.shape[1], rows.shape[1]), dtype=dtype, device=rows.device)
    for part in back[:, :, k]:
        if len(rows):
            here = part < len(rows)
            found += torch.where(here[:, None], rows.index_select(0, part.clamp(max=len(rows) - 1)), 0)
    return found


@dataclass(frozen=True)
class RowOps:
    """These as a build wants them computed."""

    scatter: Callable[[Tensor, Tensor, Tensor], Tensor] = scatter_rows
    sum: Callable[[Tensor, Tensor | None, Tensor, Tensor | None], Tensor] = sum_rows
    combine: Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor] = combine_rows
    by_expert: Callable[[Tensor, int], tuple[Tensor, Tensor]] = by_expert
    sort: Callable[[Tensor, int, bool], tuple[Tensor, Tensor, Tensor, Tensor]] = sort_assignments

    @classmethod
    def of(cls, build: Build) -> RowOps:
        return cls(*(build.fuse(each) for each in (scatter_rows, sum_rows, combine_rows, by_expert, sort_assignments)))
