"""Several functions of autograd as one node of it.

A node costs the host seven to fifteen microseconds beside what it computes, and modules, views and additions between
nodes as much again. A region is planned once: which function takes what of those before it. Each call then runs their
forwards, and the backward their adjoints in the opposite order, with a plain object in place of autograd's context. So
a function is written once, for a node of its own and for a region, and gives the same bits in both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from stretto.autograd.function import Function, adjoint

Write = Callable[[Tensor, bool], object]
"""Of a gradient: adds it to a total, or sets that where it is the first of a step."""

Value = int
"""The number of a tensor in a region."""


class _Step(NamedTuple):
    function: Any
    op: Any
    reads: tuple[Value, ...]
    writes: slice
    last: tuple[Value, ...] = ()
    """Of what it reads, or writes, nothing takes these later."""


class Region:
    """Functions with `forward(ctx, op, *tensors)` that take `inputs` tensors and each other's outputs.

    Gradients of the parameters among what they take go to `add`, called as `Accumulators.add` is.

    What they keep is let go of as the backward comes past them, as by nodes of their own; so saved tensor hooks see
    nothing of it: no region within a checkpoint. A gradient is None where nothing takes an output. No function may
    keep what leaves the region, which would keep itself.
    """

    nothing: Value = -1
    """An input that is None."""

    def __init__(self, inputs: int, add: Callable[[nn.Parameter, Write], object]) -> None:
        self.inputs, self.add_gradient = inputs, add
        self.steps: list[_Step] = []
        self.outputs: tuple[Value, ...] = ()
        self.parameters: list[tuple[Value, nn.Parameter]] = []
        self.watched: list[Tensor] = []
        """What nobody may write between a forward and its backward."""
        self.size = inputs

    def parameter(self, tensor: nn.Parameter | None) -> Value:
        """A tensor that is the same at each call."""
        if tensor is None:
            return self.nothing
        (n,) = self._numbers(1)
        self.parameters.append((n, tensor))
        self.watched.append(tensor)
        return n

    def add(self, function: Any, op: Any, *reads: Value, writes: int = 1) -> tuple[Value, ...]:
        """Call a function behind those that are there: the numbers of its outputs, of which there are so many."""
        made = self._numbers(writes)
        self.steps.append(_Step(function, op, reads, slice(made[0], made[-1] + 1)))
        return made

    def add_linear(
        self, there: Callable[..., Any], back: Callable[..., tuple[Tensor, ...]], *reads: Value, writes: int = 1
    ) -> tuple[Value, ...]:
        """The same of a function whose adjoint is `back`, and needs nothing of the forward."""
        return self.add(_Linear, (there, back), *reads, writes=writes)

    def close(self, *outputs: Value) -> Region:
        """Itself, with what leaves it."""
        self.outputs, later = outputs, {*outputs, self.nothing, *(n for n, _ in self.parameters)}
        for n in reversed(range(len(self.steps))):
            step = self.steps[n]
            here = {*step.reads, *range(step.writes.start, step.writes.stop)} - later
            self.steps[n] = step._replace(last=tuple(here))
            later |= here
        return self

    def __call__(self, *values: Tensor) -> Any:
        """The tensor that leaves it, or a tuple of them."""
        return _Node.apply(self, *values)  # type: ignore[no-untyped-call]

    def _numbers(self, n: int) -> tuple[Value, ...]:
        self.size += n
        return tuple(range(self.size - n, self.size))


class _Kept:
    """What a function keeps between forward and backward, in the place of autograd's context."""

    saved_tensors: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        """No gradient is made of nothing."""


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, op: tuple[Callable[..., Any], Callable[..., tuple[Tensor, ...]]], *x: Tensor) -> Any:
        there, ctx.back = op
        return there(*x)

    @staticmethod
    @adjoint
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.back(*gradients)


class _Node(Function):
    @staticmethod
    def forward(ctx: Any, region: Region, *given: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.region, ctx.kept, ctx.versions = region, (every := []), [each._version for each in region.watched]
        held: list[Any] = [*given, *[None] * (region.size - region.inputs + 1)]  # the last is `nothing`
        for n, parameter in region.parameters:
            held[n] = parameter
        for function, op, reads, writes, last in region.steps:
            every.append(kept := _Kept())
            made = function.forward(kept, op, *[held[n] for n in reads])
            if type(made) is tuple:
                held[writes] = made
            else:
                held[writes.start] = made
            for n in last:
                held[n] = None
        found = tuple([held[n] for n in region.outputs])
        return found[0] if len(found) == 1 else found

    @staticmethod
    @adjoint
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        region, kept = ctx.region, ctx.kept
        if not kept:
            raise RuntimeError("a second backward through a region: what it kept is gone with the first")
        if ctx.versions != [each._version for each in region.watched]:
            raise RuntimeError("a parameter was written between a forward and its backward")
        owed: list[Tensor | None] = [None] * (region.size + 1)
        for n, dy in zip(region.outputs, gradients, strict=True):
            owed[n] = dy
        for function, _, reads, writes, _ in reversed(region.steps):
            mine, back = kept.pop(), owed[writes]
            owed[writes] = [None] * len(back)
            for dy in back:
                if dy is not None:
                    break
            else:  # nothing comes back here
                continue
            found = function.backward(mine, *back)
            for n, dx in zip(reads, found[1:], strict=True):
                if dx is not None:
                    before = owed[n]
                    owed[n] = dx if before is None else before + dx
        for n, parameter in region.parameters:
            if (gradient := owed[n]) is not None and parameter.requires_grad:
                region.add_gradient(parameter, partial(_put, gradient))
        return None, *owed[: region.inputs]


def _put(gradient: Tensor, total: Tensor, first_microbatch: bool) -> None:
    total.copy_(gradient) if first_microbatch else total.add_(gradient)
