"""GEMMs of `exact`: slice by slice, each from contiguous and aligned memory into memory of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stretto.ordered import tree_of
from stretto.tensor_parallel.build import Factor
from stretto.tensor_parallel.linear import accumulate_matmul, rows

ALIGNED = 256
"""Bytes: kernels are chosen by the alignment of what they are given, up to this (cuBLAS) or less (MKL: 64)."""


class SlicedColumns:
    """`Gemms` of a weight whose rows tp cuts: of each part of the stack its own slices."""

    def __init__(self, here: int, stack: tuple[tuple[int, int], ...]) -> None:
        self.here = here
        self.sizes = [n // slices for n, slices in stack for _ in range(slices)]
        # Slices of a part that has fewer go to the first of those that they belong to.
        places = [i * (here // slices) for _, slices in stack for i in range(slices)]
        self.of_slice = [[n for n, place in enumerate(places) if place == j] for j in range(here)]

    def expect(self, weight: nn.Parameter) -> None:
        """It takes any."""

    def forward(
        self, x: Tensor, weight: nn.Parameter, bias: Tensor | None, *, column: bool, keep: bool
    ) -> tuple[Tensor, Factor]:
        """As `Gemms`."""
        del column
        x = placed(x)
        biases = [None] * len(self.sizes) if bias is None else torch.split(bias, self.sizes)
        parts = zip(torch.split(weight, self.sizes), biases, strict=True)
        y = torch.cat([F.linear(x, placed(w), None if b is None else placed(b)) for w, b in parts], -1)
        return y, (x,) if keep else ()

    def recompute(self, x: Tensor, kept: Factor) -> Factor:
        """As `Gemms`."""
        del kept
        return (placed(x),)

    def backward(self, dy: Tensor, weight: nn.Parameter, *, column: bool) -> tuple[Tensor, Factor]:
        """As `Gemms`; dx is a node of the tree over all slices."""
        del column
        dys, ws = [placed(part) for part in torch.split(dy, self.sizes, -1)], torch.split(weight, self.sizes)

        def term(j: int) -> Tensor:
            first, *more = self.of_slice[j]
            dx = dys[first] @ placed(ws[first])
            for n in more:
                dx = dx + dys[n] @ placed(ws[n])
            return dx

        return tree_of(term, self.here), tuple(dys)

    def add(self, total: Tensor, first_microbatch: bool, dy: Factor, x: Factor) -> None:
        """As `Gemms`."""
        for view, part in zip(torch.split(total, self.sizes), dy, strict=True):
            add_matmul(view, first_microbatch, rows(part), rows(x[0]))

    def bias(self, dy: Tensor) -> Tensor:
        """As `Gemms`."""
        return torch.cat([rows(placed(part)).sum(0) for part in torch.split(dy, self.sizes, -1)])


class SlicedRows:
    """`Gemms` of a weight whose columns tp cuts."""

    def __init__(self, here: int) -> None:
        self.here = here

    def expect(self, weight: nn.Parameter) -> None:
        """It takes any."""

    def forward(
        self, x: Tensor, weight: nn.Parameter, bias: Tensor | None, *, column: bool, keep: bool
    ) -> tuple[Tensor, Factor]:
        """As `Gemms`; y is a node of the tree over all slices."""
        del column, bias
        xs, ws = x.chunk(self.here, -1), weight.chunk(self.here, 1)
        y = tree_of(lambda j: F.linear(placed(xs[j]), placed(ws[j])), self.here)
        return y, (x,) if keep else ()

    def recompute(self, x: Tensor, kept: Factor) -> Factor:
        """As `Gemms`."""
        del kept
        return (x,)

    def backward(self, dy: Tensor, weight: nn.Parameter, *, column: bool) -> tuple[Tensor, Factor]:
        """As `Gemms`."""
        del column
        dy = placed(dy)
        return torch.cat([dy @ placed(w) for w in weight.chunk(self.here, 1)], -1), (dy,)

    def add(self, total: Tensor, first_microbatch: bool, dy: Factor, x: Factor) -> None:
        """As `Gemms`."""
        for view, part in zip(total.chunk(self.here, 1), x[0].chunk(self.here, -1), strict=True):
            add_matmul(view, first_microbatch, rows(dy[0]), rows(placed(part)))

    def bias(self, dy: Tensor) -> Tensor:
        """As `Gemms`: there is none before the sum."""
        raise NotImplementedError(f"a bias before the sum over tp, of a gradient {tuple(dy.shape)}")


class HeadGemms:
    """Those of a head [V/t, h]: in `exact` slices, or as it lies, which counts as one."""

    def __init__(self, exact: int | None) -> None:
        self.exact, self.slices = exact is not None, exact or 1

    def parts(self, weight: Tensor) -> list[Tensor]:
        """The slices, for the logits."""
        return [placed(part) for part in weight.chunk(self.slices)] if self.exact else [weight]

    def input_gradient(self, grads: Sequence[Tensor], weight: Tensor, out: Tensor) -> None:
        """out [n, h] = the gradients of the logits [n, V/t], in slices, times the weight."""
        if self.exact:
            parts = weight.chunk(self.slices)
            out.copy_(tree_of(lambda n: grads[n] @ placed(parts[n]), self.slices))
        else:
            torch.mm(grads[0], weight, out=out)

    def add(self, total: Tensor, first: bool, grads: Sequence[Tensor], rows: Tensor) -> None:
        """total [V/t, h] (+)= the gradients of the logits, transposed, times rows [n, h]; = where it is the `first`."""
        if not self.exact:
            accumulate_matmul(total, first, grads[0], rows)
            return
        for part, grad in zip(total.chunk(self.slices), grads, strict=True):
            add_matmul(part, first, grad, rows)


def placed(x: Tensor) -> Tensor:
    """The same where kernels find it alike, however it was cut out: contiguous and aligned."""
    x = x.contiguous()
    return x if x.data_ptr() % (ALIGNED if x.is_cuda else 64) == 0 else x.clone()


def add_matmul(total: Tensor, first_microbatch: bool, dy: Tensor, x: Tensor) -> None:
    """total [d_out, d_in], a part of a larger one, (+)= dy^T x of dy [n, d_out], x [n, d_in]."""
    part = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    accumulate_matmul(part, True, dy, x)
    total.copy_(part) if first_microbatch else total.add_(part)
