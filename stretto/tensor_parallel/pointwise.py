"""Cheap operations in front of a GEMM: little work on much memory, each beside its adjoint.

A GPU spends on them what it takes to read and write, so each is one kernel (`Build.fuse`), and what they make need not
be kept for the backward: doing them once more costs one write, which the GEMM's backward reads anyway
(Korthikanti et al., "Reducing activation recomputation", 2022, do the same with attention).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from stretto.autograd import Function, Region, Value, adjoint
from stretto.tensor_parallel import formulas
from stretto.tensor_parallel.build import Build
from stretto.tensor_parallel.formulas import Backward, Formula, Forward


@dataclass(frozen=True)
class Pointwise:
    """An operation with its adjoint. `both` gives the output once more and the gradients, in one pass over memory."""

    forward: Forward
    backward: Backward
    both: Callable[..., tuple[Tensor, ...]]
    recompute: bool
    weighted: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None
    """`formulas.weighted` of it, of operations of one input."""

    @classmethod
    def of(cls, formula: Formula, build: Build, **bound: float) -> Pointwise:
        """A formula as `build` wants it computed, with some of its arguments `bound`."""

        def fused(function: Callable[..., Any]) -> Callable[..., Any]:
            return build.fuse(partial(function, **bound) if bound else function)

        weighted = fused(formula.weighted or partial(formulas.weighted, formula.both))
        return cls(fused(formula.forward), fused(formula.backward), fused(formula.both), build.recompute, weighted)

    def __call__(self, *inputs: Tensor) -> Tensor | Lazy:
        """The output, or where it is not to be kept, how to make it."""
        return Lazy(self, inputs) if self.recompute else self.now(*inputs)

    def now(self, *inputs: Tensor) -> Tensor:
        """The output as a tensor, whoever takes it."""
        return self.kept(*inputs)[0]

    def with_residual(self, *inputs: Tensor) -> WithResidual:
        """The output, and the first input for what goes past the operation, as the residual of a block does.

        The gradient of the input, from both ways, is made in one pass. The operation must take `residual`.
        """
        return WithResidual(Lazy(self, inputs)) if self.recompute else WithResidual(*self.kept(*inputs))

    def kept(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The output and the first input, both as tensors."""
        return _Apply.apply(self, *inputs)  # type: ignore[no-any-return, no-untyped-call]

    def record(self, region: Region, *inputs: Value) -> tuple[Value, ...]:
        """`kept` in a region."""
        return region.add(_Apply, self, *inputs, writes=2)


@dataclass
class Lazy:
    """An output that is not made yet. The GEMM that takes it makes it, forward and backward."""

    made_by: Pointwise
    inputs: tuple[Tensor, ...]
    residual: Tensor | None = None
    """The first input, when the product was taken: what goes past has its gradient added by that product."""

    def made(self) -> Tensor:
        """The output as a tensor, for who keeps it."""
        output, self.residual = self.made_by.kept(*self.inputs)
        return output


@dataclass(frozen=True)
class WithResidual:
    """Two ways of an input: through an operation, and past it."""

    output: Tensor | Lazy
    _residual: Tensor | None = None

    @property
    def residual(self) -> Tensor:
        """The input itself. Raises RuntimeError while nothing has taken a `output` that is not made yet."""
        residual = self.output.residual if isinstance(self.output, Lazy) else self._residual
        if residual is None:
            raise RuntimeError("what goes past a lazy operation is known when a GEMM has taken its output")
        return residual


def gradients(
    backward: Callable[..., tuple[Tensor, ...]], dy: Tensor, dresidual: Tensor | None, *inputs: Tensor
) -> Any:
    """What `backward` or `both` of an operation gives, with the gradient from `residual` it where there is one."""
    return backward(dy, *inputs) if dresidual is None else backward(dy, *inputs, dresidual=dresidual)


class _Apply(Function):
    @staticmethod
    def forward(ctx: Any, op: Pointwise, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.op = op
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        return op.forward(*inputs), inputs[0].view_as(inputs[0])

    @staticmethod
    @adjoint
    def backward(ctx: Any, dy: Tensor | None, dresidual: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:  # nobody used the output
            return None, dresidual, *[None] * (len(ctx.saved_tensors) - 1)
        return None, *gradients(ctx.op.backward, dy, dresidual, *ctx.saved_tensors)
