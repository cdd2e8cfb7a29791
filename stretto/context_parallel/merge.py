"""Outputs of attention to parts of the keys, merged into one in fp32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor


class Merge:
    """Sums outputs [b, heads, n, d] weighed by the share that their keys have of a query's exponentials.

    y = sum of exp(lse_i - lse) y_i with lse = log sum of exp(lse_i): in fp32 or wider until `result` rounds it once,
    since a sum that is rounded to bf16 with each part loses a digit with every rank.
    """

    def __init__(self, like: Tensor) -> None:
        wide = torch.promote_types(like.dtype, torch.float32)
        b, heads, n, d = like.shape
        # Sequence first in memory, where the next GEMM reads it: else it would be copied, and kept twice.
        self._y = torch.zeros((n, b, heads, d), dtype=wide, device=like.device).permute(1, 2, 0, 3)
        self._lse = torch.full(like.shape[:-1], -torch.inf, dtype=wide, device=like.device)

    def add(self, rows: slice, queries: slice, y: Tensor, lse: Tensor) -> None:
        """Output and LSE of some queries of some rows."""
        before, kept = self._lse[rows, :, queries], self._y[rows, :, queries]
        after = torch.logaddexp(before, lse.to(before.dtype))
        # Where no key was seen yet, neither here: minus infinity from itself is no number.
        base = after.masked_fill(after == -torch.inf, 0.0)
        kept.mul_((before - base).exp()[..., None]).add_(
            y.to(kept.dtype) * (lse.to(base.dtype) - base).exp()[..., None]
        )
        before.copy_(after)

    def result(self, dtype: torch.dtype, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The output, rounded; and the LSE over all keys, infinite where a query saw none: its weights are zero.

        `sinks` [heads] are scores of one more key, without a value.
        """
        if sinks is not None:
            before = self._lse
            self._lse = torch.logaddexp(before, sinks.to(before.dtype)[:, None])
            self._y.mul_((before - self._lse).exp()[..., None])
        return self._y.to(dtype), self._lse.masked_fill(self._lse == -torch.inf, torch.inf)
