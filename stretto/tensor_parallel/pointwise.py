"""Cheap operations in front of a matrix product: little work on much memory, each beside its adjoint.

A GPU spends on them what it takes to read and write, so each is one kernel (`Build.fuse`), and what they make need not
be kept for the backward: doing them once more costs one write, which the matrix product's backward reads anyway
(Korthikanti et al., "Reducing activation recomputation", 2022, do the same with attention).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from stretto.tensor_parallel.build import Build
from stretto.tensor_parallel.formulas import Backward, Formula, Forward


@dataclass(frozen=True)
class Pointwise:
    """An operation with its adjoint. `both` gives the output once more and the gradients, in one pass over memory."""

    forward: Forward
    backward: Backward
    both: Callable[..., tuple[Tensor, ...]]
    again: bool

    @classmethod
    def of(cls, formula: Formula, build: Build, **bound: float) -> Pointwise:
        """A formula as `build` wants it computed, with some of its arguments `bound`."""

        def fused(function: Callable[..., Any]) -> Callable[..., Any]:
            return build.fuse(partial(function, **bound) if bound else function)

        return cls(fused(formula.forward), fused(formula.backward), fused(formula.both), build.again)

    def __call__(self, *inputs: Tensor) -> Tensor | Lazy:
        """The output, or where it is not to be kept, how to make it."""
        return Lazy(self, inputs) if self.again else self.now(*inputs)

    def now(self, *inputs: Tensor) -> Tensor:
        """The output as a tensor, whoever takes it."""
        return self._kept(*inputs)[0]

    def fork(self, *inputs: Tensor) -> Fork:
        """The output, and the first input for what goes past the operation, as the residual of a block does.

        The gradient of the input, from both ways, is made in one pass. The operation must take `past`.
        """
        return Fork(Lazy(self, inputs)) if self.again else Fork(*self._kept(*inputs))

    def _kept(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return _Apply.apply(self, *inputs)  # type: ignore[no-any-return, no-untyped-call]


@dataclass
class Lazy:
    """An output that is not made yet. The matrix product that takes it makes it, forward and backward."""

    made_by: Pointwise
    inputs: tuple[Tensor, ...]
    past: Tensor | None = None
    """The first input, when the product was taken: what goes past has its gradient added by that product."""


@dataclass(frozen=True)
class Fork:
    """Two ways of an input: through an operation, and past it."""

    through: Tensor | Lazy
    _past: Tensor | None = None

    @property
    def past(self) -> Tensor:
        """The input itself. Raises RuntimeError while nothing has taken a `through` that is not made yet."""
        past = self.through.past if isinstance(self.through, Lazy) else self._past
        if past is None:
            raise RuntimeError("what goes past a lazy operation is known when a matrix product has taken its output")
        return past


def gradients(backward: Callable[..., tuple[Tensor, ...]], dy: Tensor, past: Tensor | None, *inputs: Tensor) -> Any:
    """What `backward` or `both` of an operation gives, with the gradient from `past` it where there is one."""
    return backward(dy, *inputs) if past is None else backward(dy, *inputs, past=past)


class _Apply(Function):
    @staticmethod
    def forward(ctx: Any, op: Pointwise, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.op = op
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        # Detached: autograd looks no further, nor should the compiler.
        return op.forward(*(x.detach() for x in inputs)), inputs[0].view_as(inputs[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, past: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:  # nobody used the output
            return None, past, *[None] * (len(ctx.saved_tensors) - 1)
        return None, *gradients(ctx.op.backward, dy, past, *ctx.saved_tensors)
