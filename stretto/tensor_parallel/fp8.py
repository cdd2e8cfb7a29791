"""GEMMs of FP8 (Micikevicius et al., "FP8 formats for deep learning", 2022).

A number is a small one times a scale, the least power of two that brings the largest of a tensor, or of a row, into the
format (now, not as it was some steps ago). To divide by it is exact: eagerly, compiled or by hand, cut or whole, x is
rounded to the same numbers. Other scales differ in their last bit from one way to the next (one divides by 448, one
multiplies by one over it), and then two of a thousand numbers go to their other neighbour. Scales stay on the device.
Sums are in fp32.

Matrix units want both factors with the dim that is summed over innermost, so what takes part in two products is
written twice, as it lies and transposed. Tensors take two passes over memory: one for the scale, one for the copies.

    product                factors                    tensorwise        rowwise
    y  = x W^T             x [n, d_in],  W            one scale each    a scale for each token, and each row of W
    dx = dy W              dy [n, d_out], W^T         one scale each    a scale for each token, and each column of W
    dW = dy^T x            dy^T, x^T                  one scale each    in the dtype of the activations

A scale for each token cannot go into dW, which sums over tokens: it would take copies with a scale for each feature,
two more passes over all activations. In bf16 the product adds to fp32 sums by itself, and keeps what is small in
gradients. Numbers are e4m3; one scale for a whole dy leaves its small ones to the exponent, so there they are e5m2.

Where the ranks of tp have parts of what one scale is for, the largest of theirs is taken. So a layout has the scales
of one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from stretto.collectives import all_reduce_max
from stretto.tensor_parallel.build import Factor, WeightInFp8, unfused
from stretto.tensor_parallel.linear import accumulate_matmul, rows
from stretto.world import Axis

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

LEAST = 1e-30
"""What is smaller counts as zeros: its scale must stay a normal number in fp32."""

EXPONENT, PAST_1_75 = 0x7F800000, 0x001FFFFF
"""Of the bits of a number in fp32: its exponent; what, added, takes all above 1.75 times a power of two to the next."""


def scale(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """What numbers of `dtype` are multiplied by to mean those of x, [n, d] -> [1, 1] in fp32."""
    return meaning(x.abs().amax(), dtype).view(1, 1)


def row_scale(x: Tensor) -> Tensor:
    """The same in e4m3 for each row, [n, d] -> [n, 1]."""
    return meaning(x.abs().amax(-1, keepdim=True), E4M3)


def column_scale(x: Tensor) -> Tensor:
    """And for each column, [n, d] -> [1, d]."""
    return meaning(x.abs().amax(0, keepdim=True), E4M3)


def quantize(x: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """x [n, d] in units of its scale, rounded to `dtype`."""
    return (x.float() * (1 / scale)).to(dtype)


def quantize_transposed(x: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """The same as [d, n]: where tokens are summed over, they must lie next to each other."""
    return quantize(x, scale, dtype=dtype).t().contiguous()


def quantize_both(x: Tensor, scale: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[n, d] and [d, n]."""
    small = quantize(x, scale, dtype=dtype)
    return small, small.t().contiguous()


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of x [n, d] in units of its own scale, in e4m3, and the scales [n, 1]: one pass, a row at a time."""
    scale = row_scale(x)
    return quantize(x, scale, dtype=E4M3), scale


def quantize_cut_rows(x: Tensor, scale: Tensor) -> Tensor:
    """The same where the scales had to be agreed on."""
    return quantize(x, scale, dtype=E4M3)


def quantize_columns(x: Tensor, scale: Tensor) -> Tensor:
    """Each column of x [n, d] in units of its own scale, as [d, n] in e4m3."""
    return quantize_transposed(x, scale, dtype=E4M3)


def add_(total: Tensor, part: Tensor) -> None:
    """total += part, which may be of a narrower dtype."""
    total.add_(part)


def power(dtype: torch.dtype) -> int:
    """p of the largest number of a format, 1.75 * 2^p: e4m3 448, e5m2 57344."""
    return math.frexp(torch.finfo(dtype).max)[1] - 1


def meaning(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The least power of two that `largest` is at most 1.75 * 2^p times; what is not finite stays so."""
    largest = largest.float()
    exponent = (largest.clamp(min=LEAST).view(torch.int32) + PAST_1_75) & EXPONENT
    return torch.where(largest.isfinite(), (exponent - (power(dtype) << 23)).view(torch.float32), largest)


@dataclass(frozen=True)
class Weight:
    """A `WeightInFp8` that is made from W in a wider dtype."""

    plain: Tensor
    plain_scale: Tensor
    across: Tensor
    across_scale: Tensor


class Fp8:
    """What both recipes share: the axis that tensors are cut along, the passes, and weights quantized once a step."""

    def __init__(self, tp: Axis, fuse: Callable[[Callable[..., Any]], Callable[..., Any]] = unfused) -> None:
        self.tp = tp
        self.scale, self.row_scale, self.column_scale = fuse(scale), fuse(row_scale), fuse(column_scale)
        self.quantize, self.quantize_transposed, self.quantize_both = (
            fuse(quantize),
            fuse(quantize_transposed),
            fuse(quantize_both),
        )
        self.quantize_rows, self.add_ = fuse(quantize_rows), fuse(add_)
        self.quantize_cut_rows, self.quantize_columns = fuse(quantize_cut_rows), fuse(quantize_columns)
        self._steady: dict[nn.Parameter, Weight] | None = None
        self.matrices: set[nn.Parameter] = set()
        """What it multiplies by."""
        self.gathered: Mapping[nn.Parameter, WeightInFp8] = {}
        """Those of them that come in FP8 from the ranks that share them."""

    def expect(self, weight: nn.Parameter) -> None:
        """As `Gemms`."""
        self.matrices.add(weight)

    def bias(self, dy: Tensor) -> Tensor:
        """As `Gemms`: dy is not quantized for it."""
        return rows(dy).sum(0)

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Weights do not change in here: each is quantized once, and not whenever it is used."""
        self._steady = {}
        try:
            yield
        finally:
            self._steady = None

    def weight(self, weight: nn.Parameter, *, column: bool) -> WeightInFp8:
        """W in fp8; `column` says that its rows are cut over tp, else its columns are."""
        if (gathered := self.gathered.get(weight)) is not None:
            return gathered
        if self._steady is None:
            return self.make(weight.data, column=column)
        if weight not in self._steady:
            self._steady[weight] = self.make(weight.data, column=column)
        return self._steady[weight]

    def held(self) -> list[Tensor]:
        """What `steady` keeps now."""
        kept = (self._steady or {}).values()
        return [t for w in kept for t in (w.plain, w.plain_scale, w.across, w.across_scale)]

    def make(self, weight: Tensor, *, column: bool) -> Weight:
        """W in fp8, made now."""
        raise NotImplementedError

    def agreed(self, scale: Tensor, *, cut: bool) -> Tensor:
        """The scale of the whole tensor; `cut` says that each rank of tp has seen a part."""
        return all_reduce_max(scale, self.tp) if cut else scale


class Tensorwise(Fp8):
    """One scale for a tensor; all three products in fp8. For the backward x^T is kept, in a byte for each number."""

    def make(self, weight: Tensor, *, column: bool) -> Weight:
        del column  # either way each rank has a part
        scale = self.agreed(self.scale(weight, dtype=E4M3), cut=True)
        plain, across = self.quantize_both(weight, scale, dtype=E4M3)
        return Weight(plain, scale, across, scale)

    def forward(
        self, x: Tensor, weight: nn.Parameter, bias: Tensor | None, *, column: bool, keep: bool
    ) -> tuple[Tensor, Factor]:
        flat = _bare(x)
        scale = self.agreed(self.scale(flat, dtype=E4M3), cut=not column)
        w = self.weight(weight, column=column)
        if keep:
            plain, across = self.quantize_both(flat, scale, dtype=E4M3)
            kept: Factor = (scale, across)
        else:
            plain, kept = self.quantize(flat, scale, dtype=E4M3), (scale,)
        return _shaped(_matmul(plain, w.plain, scale, w.plain_scale, x.dtype, fast=True), x, bias), kept

    def recompute(self, x: Tensor, kept: Factor) -> Factor:
        return kept[0], self.quantize_transposed(_bare(x), kept[0], dtype=E4M3)

    def backward(self, dy: Tensor, weight: nn.Parameter, *, column: bool) -> tuple[Tensor, Factor]:
        flat = _bare(dy)
        scale = self.agreed(self.scale(flat, dtype=E5M2), cut=column)
        plain, across = self.quantize_both(flat, scale, dtype=E5M2)
        w = self.weight(weight, column=column)
        return _shaped(_matmul(plain, w.across, scale, w.across_scale, dy.dtype), dy), (scale, across)

    def add(self, total: Tensor, first_microbatch: bool, dy: Factor, x: Factor) -> None:
        product = partial(_matmul, dy[1], x[1], dy[0], x[0])
        # Rounding to bf16 is a sixteenth of that of the factors, and half of what there is to write and to read.
        product(total.dtype, out=total) if first_microbatch else self.add_(total, product(torch.bfloat16))


class Rowwise(Fp8):
    """A scale for each row of a factor; the weight gradient in the dtype of the activations."""

    def make(self, weight: Tensor, *, column: bool) -> Weight:
        plain, by_row = self.rows(weight, cut=not column)
        by_column = self.agreed(self.column_scale(weight), cut=column)
        return Weight(plain, by_row.t(), self.quantize_columns(weight, by_column), by_column)

    def rows(self, x: Tensor, *, cut: bool) -> tuple[Tensor, Tensor]:
        """Each row of x [n, d] in units of its scale, and the scales; `cut` says that tp has parts of the rows."""
        if cut and self.tp.size > 1:
            scale = self.agreed(self.row_scale(x), cut=True)
            return self.quantize_cut_rows(x, scale), scale
        plain, scale = self.quantize_rows(x)
        return plain, scale

    def forward(
        self, x: Tensor, weight: nn.Parameter, bias: Tensor | None, *, column: bool, keep: bool
    ) -> tuple[Tensor, Factor]:
        plain, scale = self.rows(_bare(x), cut=not column)
        w = self.weight(weight, column=column)
        y = _matmul(plain, w.plain, scale, w.plain_scale, x.dtype, fast=True)
        return _shaped(y, x, bias), (x,) if keep else ()

    def recompute(self, x: Tensor, kept: Factor) -> Factor:
        del kept
        return (x,)

    def backward(self, dy: Tensor, weight: nn.Parameter, *, column: bool) -> tuple[Tensor, Factor]:
        plain, scale = self.rows(_bare(dy), cut=column)
        w = self.weight(weight, column=column)
        dx = _matmul(plain, w.across, scale, w.across_scale, dy.dtype)
        return _shaped(dx, dy), (dy,)

    def add(self, total: Tensor, first_microbatch: bool, dy: Factor, x: Factor) -> None:
        accumulate_matmul(total, first_microbatch, rows(dy[0]), rows(x[0]))


RECIPES: Mapping[str, type[Tensorwise] | type[Rowwise]] = MappingProxyType(
    {"tensorwise": Tensorwise, "rowwise": Rowwise}
)
"""By the word of the setting."""


def _matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    dtype: torch.dtype,
    *,
    fast: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """a [m, k] times b [n, k] transposed. `fast` leaves sums longer in the matrix unit, which has some bits less than
    fp32; gradients have no such sums.
    """
    if a.device.type == "cpu":  # where torch 2.11 takes no scale per row, and oneDNN's code for one per matrix is slow
        exact = (a.float() @ b.float().t()).mul_(a_scale).mul_(b_scale)
        return exact.to(dtype) if out is None else out.copy_(exact)
    y: Tensor = torch._scaled_mm(a, b.t(), a_scale, b_scale, out_dtype=dtype, use_fast_accum=fast, out=out)
    return y


def _bare(x: Tensor) -> Tensor:
    """[.., d] -> [n, d], to the compiler no view of anything: it would make each pass anew for each kind of view."""
    return rows(x).data


def _shaped(y: Tensor, like: Tensor, bias: Tensor | None = None) -> Tensor:
    """[n, d] -> [.., d] as the rows of `like` lie, with the bias added."""
    y = y.view(*like.shape[:-1], -1)
    return y if bias is None else y + bias
