"""Outputs of attention to parts of the keys, merged into one in fp32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor

from stretto.context_parallel.parts import Combine, Parts


def merge_(y: Tensor, lse: Tensor, one: Tensor, one_lse: Tensor, two: Tensor, two_lse: Tensor) -> None:
    """Two outputs [b, heads, n, d] as one, weighed by the share that their keys have of a query's exponentials.

    y = exp(lse_1 - lse) y_1 + exp(lse_2 - lse) y_2 with lse = log(exp(lse_1) + exp(lse_2)) [b, heads, n], all of it in
    fp32 or wider, and rounded once: a sum that is rounded to bf16 with each part loses a digit with every rank.
    """
    a, b = one_lse.to(lse.dtype), two_lse.to(lse.dtype)
    whole = torch.logaddexp(a, b)
    # Where no key was seen, neither here: minus infinity from itself is no number.
    base = whole.masked_fill(whole == -torch.inf, 0.0)
    (x, p), (z, q) = ((part.to(lse.dtype), (s - base).exp()[..., None]) for part, s in ((one, a), (two, b)))
    y.copy_(x * p + z * q)
    lse.copy_(whole)


class Merge:
    """Outputs [b, heads, n, d] of tiles and the logs of their sums of exponentials [b, heads, n], until all are there.

    `combine` computes what `merge_` says.
    """

    def __init__(self, like: Tensor, combine: Combine = merge_) -> None:
        self._like, self._parts = like, Parts(like, combine)

    def add(self, rows: slice, queries: slice, y: Tensor, lse: Tensor) -> None:
        """Output and LSE of some queries of some rows."""
        self._parts.add(rows, queries, y, lse)

    def result(self, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The output, rounded; and the LSE over all keys, infinite where a query saw none: its weights are zero.

        `sinks` [heads] are scores of one more key, without a value.
        """
        b, heads, n, d = self._like.shape
        wide = torch.promote_types(self._like.dtype, torch.float32)
        if sinks is None and (only := self._parts.only) is not None and _is_as(only[0], self._like.dtype):
            return only[0], only[1].to(wide)
        # Sequence first in memory, where the next GEMM reads it: else it would be copied, and kept twice.
        y = self._like.new_empty((n, b, heads, d), dtype=self._like.dtype if sinks is None else wide)
        y, lse = y.permute(1, 2, 0, 3), self._like.new_empty((b, heads, n), dtype=wide)
        self._parts.into(y, lse, empty=(0.0, torch.inf if sinks is None else -torch.inf))
        if sinks is not None:
            before, lse = lse, torch.logaddexp(lse, sinks.to(wide)[:, None])
            y = y.mul_((before - lse).exp()[..., None]).to(self._like.dtype)
        return y, lse


def _is_as(y: Tensor, dtype: torch.dtype) -> bool:
    return y.dtype == dtype and y.permute(2, 0, 1, 3).is_contiguous()
