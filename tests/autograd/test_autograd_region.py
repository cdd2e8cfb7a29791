"""A region is its functions one by one, to the bit, and says no less than their own nodes.

Faults to catch: a gradient of one of two uses dropped; what a later function takes let go of; a gradient set where it
is added; a backward of a weight that was written since.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from stretto.autograd import Function, Region, adjoint

pytestmark = pytest.mark.gloo


class Scaled(Function):
    """x w * op, and x."""

    @staticmethod
    def forward(ctx: Any, op: float, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        ctx.op = op
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w)
        return x * w * op, x.view_as(x)

    @staticmethod
    @adjoint
    def backward(ctx: Any, dy: Tensor | None, dx: Tensor | None) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        if dy is None:
            return None, dx, None
        found = dy * w * ctx.op
        return None, found if dx is None else found + dx, dy * x * ctx.op


class Totals:
    """Where gradients of parameters are added up."""

    def __init__(self) -> None:
        self.of: dict[nn.Parameter, Tensor] = {}

    def add(self, parameter: nn.Parameter, write: Callable[[Tensor, bool], object]) -> None:
        first = parameter not in self.of
        write(self.of.setdefault(parameter, torch.full_like(parameter, torch.nan)), first)


def both(dy: Tensor) -> tuple[Tensor, ...]:
    return dy, dy


def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def chain(length: int, uses: list[int], weights: list[nn.Parameter], totals: Totals) -> Region:
    """Each function takes the one before, each sum an earlier tensor beside it."""
    region = Region(1, totals.add)
    known, x = [0], 0
    for n in range(length):
        y, past = region.add(Scaled, 1.0 + n, x, region.parameter(weights[n]), writes=2)
        (x,) = region.add_linear(add, both, known[uses[n] % len(known)] if uses[n] % 2 else past, y)
        known.append(x)
    return region.close(x, known[len(known) // 2])


def plain(x: Tensor, length: int, uses: list[int], weights: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
    known = [x]
    for n in range(length):
        y, past = Scaled.apply(1.0 + n, x, weights[n])  # type: ignore[no-untyped-call]
        x = (known[uses[n] % len(known)] if uses[n] % 2 else past) + y
        known.append(x)
    return x, known[len(known) // 2]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.booleans())
def test_it_is_its_functions_one_by_one(uses: list[int], frozen: bool) -> None:
    torch.manual_seed(len(uses))
    weights = [nn.Parameter(torch.randn(5, dtype=torch.float64)) for _ in uses]
    weights[0].requires_grad_(not frozen)
    totals = Totals()
    region = chain(len(uses), uses, weights, totals)
    for _ in range(2):
        given = torch.randn(5, dtype=torch.float64)
        dy = [torch.randn(5, dtype=torch.float64) for _ in range(2)]
        found, wanted = ((given.clone().requires_grad_()) for _ in range(2))
        y, reference = region(found), plain(wanted, len(uses), uses, weights)
        for one, other in zip(y, reference, strict=True):
            assert torch.equal(one, other)
        torch.autograd.backward(y, dy)
        torch.autograd.backward(reference, dy)
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-12, atol=1e-12)
    for weight in weights:
        assert (weight in totals.of) is weight.requires_grad
        if weight.requires_grad:
            torch.testing.assert_close(totals.of[weight], weight.grad, rtol=1e-12, atol=1e-12)


def test_what_does_not_come_back_is_nothing() -> None:
    """The first of two outputs alone is used: the other's function is passed over."""
    weights, totals = [nn.Parameter(torch.ones(2)) for _ in range(2)], Totals()
    region = Region(1, totals.add)
    y, past = region.add(Scaled, 1.0, 0, region.parameter(weights[0]), writes=2)
    z, _ = region.add(Scaled, 1.0, past, region.parameter(weights[1]), writes=2)
    first, _ = region.close(y, z)(torch.ones(2, requires_grad=True))
    first.sum().backward()
    assert set(totals.of) == {weights[0]}


def made() -> tuple[Region, nn.Parameter]:
    weight = nn.Parameter(torch.ones(2))
    region = Region(1, Totals().add)
    y, _ = region.add(Scaled, 2.0, 0, region.parameter(weight), writes=2)
    return region.close(y), weight


def test_it_goes_back_once_and_has_no_gradient_of_a_gradient() -> None:
    region, _ = made()
    x = torch.ones(2, requires_grad=True)
    y = region(x)
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        y.sum().backward()
    (dx,) = torch.autograd.grad(region(x), x, torch.ones(2, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_weight_that_was_written_in_between_is_an_error() -> None:
    region, weight = made()
    y = region(torch.ones(2, requires_grad=True))
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="written between"):
        y.sum().backward()


def test_what_it_keeps_goes_with_its_graph() -> None:
    """Without a collection of cycles: a step has no time for one."""
    region, _ = made()
    x = torch.ones(2, requires_grad=True) * 3
    there = weakref.ref(x)
    y = region(x)
    del x
    assert there() is not None
    gc.disable()
    try:
        del y
        assert there() is None
    finally:
        gc.enable()
