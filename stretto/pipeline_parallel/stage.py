"""A stage: a part of the model, run forward and back one microbatch at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from stretto.deferred import Deferred
from stretto.pipeline_parallel.meta import DTYPES, MAX_DIM, TensorMeta


@dataclass(frozen=True)
class _Kept:
    """What lies between a forward and its backward.

    The graph is held by its end (`edge`), not by the output tensor: once the output has been sent on, its
    storage is free unless an operation saved it for its own backward.
    """

    x: Tensor | None
    edge: GradientEdge | None
    output: TensorMeta


class Stage:
    """Part `index` of a pipeline: `module(x, microbatch)`, and what its backwards still need.

    `x` is the activation of the stage before, of shape and dtype `boundary`; on the first stage both are
    None. The module returns the activation for the next stage, or on the last stage the scalar loss, already
    divided by whatever it is a mean over: the gradients of the microbatches are added up as they come.
    Gradients go into the parameters' `.grad`, through the usual hooks. `deferred` is the queue that layers
    of the module were given, if any were: with it, a backward can be split in two.

    Raises ValueError if `boundary` is none that stages can exchange.
    """

    def __init__(
        self,
        index: int,
        module: Callable[..., Any],
        boundary: TensorMeta | None,
        deferred: Deferred | None = None,
    ) -> None:
        if (boundary is None) != (index == 0):
            raise ValueError(f"stage {index} has boundary={boundary}: the first stage, and no other, has none")
        if boundary is not None and (boundary.dtype not in DTYPES or len(boundary.shape) > MAX_DIM):
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ValueError(f"stage {index} has boundary {boundary}: take {known}, and at most {MAX_DIM} dimensions")
        self.index = index
        self.module = module
        self.boundary = boundary
        self.splits = deferred is not None
        """Whether its layers may leave weight gradients for W."""
        self.received = 0
        """Bytes of the last input."""
        self._deferred = Deferred() if deferred is None else deferred
        self._kept: dict[int, _Kept] = {}

    @property
    def kept(self) -> tuple[int, ...]:
        """Microbatches that went forward and not yet all the way back."""
        return (*self._kept, *self._deferred.waiting(self.index))

    def forward(self, mb: int, x: Tensor | None, microbatch: Any) -> Tensor:
        """Run microbatch number `mb`; with gradients enabled, keep the graph for its backward.

        Returns the output cut off from the graph. Raises ValueError if `x` is not of the boundary's shape and
        dtype.
        """
        arrived = None if x is None else TensorMeta.of(x)
        if arrived != self.boundary:
            raise ValueError(f"stage {self.index} expects an input {self.boundary}, but got {arrived}")
        if x is not None:
            self.received = x.nbytes
            x = x.detach().requires_grad_(torch.is_grad_enabled())
        y: Tensor = self.module(x, microbatch)
        if torch.is_grad_enabled():
            edge = get_gradient_edge(y) if y.requires_grad else None
            self._kept[mb] = _Kept(x, edge, TensorMeta.of(y))
        return y.detach()

    def output(self, mb: int) -> TensorMeta:
        """Shape and dtype of the output kept for microbatch `mb`, which are those of its gradient."""
        return self._kept[mb].output

    def backward(self, mb: int, dy: Tensor | None) -> Tensor | None:
        """Add to the parameters' gradients; return that of the input, None on the first stage.

        `dy` is the gradient of the output of `forward(mb, ..)`; None on the last stage starts from 1. What
        was kept for `mb` is let go.
        """
        kept = self._kept.pop(mb)
        if kept.edge is not None:
            torch.autograd.backward(kept.edge, dy)
        if kept.x is None:
            return None
        # An input that the output does not depend on still owes the stage before a message.
        return torch.zeros_like(kept.x) if kept.x.grad is None else kept.x.grad

    def backward_input(self, mb: int, dy: Tensor | None) -> Tensor | None:
        """Like `backward`, but the weight gradients that layers defer wait for `backward_weight(mb)`."""
        with self._deferred.collect(self.index, mb):
            return self.backward(mb, dy)

    def backward_weight(self, mb: int) -> None:
        """Add the weight gradients of microbatch `mb` that were deferred."""
        self._deferred.run(self.index, mb)
