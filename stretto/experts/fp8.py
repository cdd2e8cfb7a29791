"""Products of experts in FP8: each row in units of its own scale, as `tensor_parallel.fp8.Rowwise` has them.

    product               factors
    y  = x W_e^T          a scale for each row of x, and for each row of each W_e
    dx = dy W_e           a scale for each row of dy, and for each column of each W_e
    dW_e = dy^T x         in the dtype of the activations

A row is a token, whose scale does not depend on where it is computed. Of an expert that etp cuts the ranks agree on the
scales of what they have parts of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stretto.experts.segments import Segments
from stretto.tensor_parallel.build import unfused
from stretto.tensor_parallel.fp8 import E4M3, Rowwise, Weight, quantize, row_scale
from stretto.world import Axis


def columns_scale(stack: Tensor) -> Tensor:
    """For each column of each matrix of [e, d_out, d_in] what its numbers mean: [e, d_in, 1]."""
    return row_scale(stack.transpose(1, 2))


def columns(stack: Tensor, scale: Tensor) -> Tensor:
    """Each column in units of its scale, as [e, d_in, d_out] in e4m3."""
    return quantize(stack.transpose(1, 2), scale, dtype=E4M3).contiguous()


class GroupedFp8(Rowwise):
    """Of the `experts` that this rank holds, which `etp` cuts."""

    def __init__(
        self, etp: Axis, experts: int, fuse: Callable[[Callable[..., Any]], Callable[..., Any]] = unfused
    ) -> None:
        super().__init__(etp, fuse)
        self.experts = experts
        self.columns_scale, self.columns = fuse(columns_scale), fuse(columns)

    def make(self, weight: Tensor, *, column: bool) -> Weight:
        """Of a stack [experts * d_out, d_in]; `column` says that etp cuts the rows of each matrix."""
        stack = weight.view(self.experts, -1, weight.shape[-1])
        plain, by_row = self.rows(weight, cut=not column)
        by_column = self.agreed(self.columns_scale(stack), cut=column)
        across = self.columns(stack, by_column)
        return Weight(plain.view_as(stack), by_row.view(self.experts, -1), across, by_column[..., 0])

    def times(self, x: Tensor, weight: nn.Parameter, segments: Segments, *, column: bool) -> Tensor:
        """x W_e^T of the rows of each expert."""
        plain, scale = self.rows(x, cut=not column)
        w = self.weight(weight, column=column)
        return _products(plain, w.plain, scale, w.plain_scale, segments, x.dtype, fast=True)

    def back(self, dy: Tensor, weight: nn.Parameter, segments: Segments, *, column: bool) -> Tensor:
        """dy W_e of the rows of each expert."""
        plain, scale = self.rows(dy, cut=column)
        w = self.weight(weight, column=column)
        return _products(plain, w.across, scale, w.across_scale, segments, dy.dtype)


def _products(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    segments: Segments,
    dtype: torch.dtype,
    *,
    fast: bool = False,
) -> Tensor:
    """Rows of a [m, k], with scales [m, 1], times their expert's of b [e, n, k] transposed, with scales [e, n]."""
    if a.is_cuda and len(a):
        y: Tensor = torch._scaled_grouped_mm(
            a, b.transpose(1, 2), a_scale.view(-1), b_scale, segments.ends, out_dtype=dtype, use_fast_accum=fast
        )
        return y
    y = torch.empty((len(a), b.shape[1]), dtype=dtype, device=a.device)
    for expert, begin, end in segments.parts():
        exact = (a[begin:end].float() @ b[expert].float().t()).mul_(a_scale[begin:end]).mul_(b_scale[expert])
        y[begin:end] = exact.to(dtype)
    return y
