"""A stage: a part of the model, run forward and back one microbatch at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from stretto.deferred import Deferred
from stretto.pipeline_parallel.meta import (
    DTYPES,
    MAX_DIM,
    Boundary,
    EachBoundary,
    Passed,
    TensorMeta,
    boundary_of,
    found,
    metas,
    tensors,
    text,
)


@dataclass(frozen=True)
class _Kept:
    """What lies between a forward and its backward.

    The graph is held by its ends (`edges`), not by the output tensors: once an output has been sent on, its
    storage is free unless an operation saved it for its own backward. `x` are the inputs that owe a gradient.
    """

    x: tuple[Tensor, ...] | None
    single: bool
    edges: tuple[GradientEdge | None, ...]
    output: Boundary
    """Of the gradients that come."""


class Stage:
    """Part `index` of a pipeline: `module(x, microbatch)`, and what its backwards still need.

    `x` is the activation of the stage before, of shape and dtype `boundary`; on the first stage both are
    None. The module returns the activation for the next stage, or on the last stage the scalar loss, already
    divided by whatever it is a mean over: the gradients of the microbatches are added up as they come. Tuples of
    tensors pass as well; `output` is then the boundary of the next stage, if some floating-point tensor in it has no
    gradient. A boundary that is a function of the microbatch allows for other lengths in each.
    Gradients go into the parameters' `.grad`, through the usual hooks. `deferred` is the queue that layers
    of the module were given, if any were: with it, a backward can be split in two.

    Raises ValueError if `boundary` is none that stages can exchange.
    """

    def __init__(
        self,
        index: int,
        module: Callable[..., Any],
        boundary: EachBoundary | None,
        deferred: Deferred | None = None,
        output: EachBoundary | None = None,
    ) -> None:
        if (boundary is None) != (index == 0):
            raise ValueError(f"stage {index} has boundary={boundary}: the first stage, and no other, has none")
        for meta in metas(boundary) if isinstance(boundary, TensorMeta | tuple) else ():
            if meta.dtype not in DTYPES or len(meta.shape) > MAX_DIM:
                known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
                raise ValueError(f"stage {index} has boundary {meta}: take {known}, and at most {MAX_DIM} dimensions")
        self.index = index
        self.module = module
        self.boundary = boundary
        self._output = output
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

    def entering(self, microbatch: Any) -> Boundary | None:
        """What enters for this microbatch; None on the first stage."""
        return boundary_of(self.boundary, microbatch)

    def forward(self, mb: int, x: Passed | None, microbatch: Any) -> Passed:
        """Run microbatch number `mb`; with gradients enabled, keep the graph for its backward.

        Returns the output cut off from the graph. Raises ValueError if `x` is not of the boundary's shape and
        dtype, or the output not of that of the next stage.
        """
        expected, arrived = self.entering(microbatch), None if x is None else found(x)
        if arrived != expected:
            wanted, got = (None if each is None else text(each) for each in (expected, arrived))
            raise ValueError(f"stage {self.index} expects an input {wanted}, but got {got}")
        owed: tuple[Tensor, ...] | None = None
        if x is not None and expected is not None:
            self.received = sum(each.nbytes for each in tensors(x))
            training = torch.is_grad_enabled()
            entered = tuple(
                each.detach().requires_grad_(training and meta.differentiable)
                for each, meta in zip(tensors(x), metas(expected), strict=True)
            )
            owed = tuple(each for each, meta in zip(entered, metas(expected), strict=True) if meta.differentiable)
            x = entered[0] if isinstance(x, Tensor) else entered
        y: Passed = self.module(x, microbatch)
        single = isinstance(x, Tensor)
        puts = boundary_of(self._output, microbatch)
        if puts is not None and found(y) != puts:
            raise ValueError(f"stage {self.index} puts out {text(found(y))}, but the next one expects {text(puts)}")
        if torch.is_grad_enabled():
            passed, leaving = tensors(y), metas(found(y) if puts is None else puts)
            edges = tuple(
                get_gradient_edge(each) if each.requires_grad else None
                for each, meta in zip(passed, leaving, strict=True)
                if meta.differentiable
            )
            back = tuple(meta for meta in leaving if meta.differentiable)
            whole = back[0] if isinstance(y, Tensor) and back else back
            self._kept[mb] = _Kept(owed, single and bool(owed), edges, whole)
        return y.detach() if isinstance(y, Tensor) else tuple(each.detach() for each in y)

    def output(self, mb: int) -> Boundary:
        """Shapes and dtypes of the gradients that come back for the output kept for microbatch `mb`."""
        return self._kept[mb].output

    def backward(self, mb: int, dy: Passed | None) -> Passed | None:
        """Add to the parameters' gradients; return that of the input, None on the first stage.

        `dy` is the gradient of the output of `forward(mb, ..)`; None on the last stage starts from 1. What
        was kept for `mb` is let go.
        """
        kept = self._kept.pop(mb)
        given = (None,) if dy is None else tensors(dy)
        pairs = [(edge, each) for edge, each in zip(kept.edges, given, strict=True) if edge is not None]
        if pairs:
            torch.autograd.backward([edge for edge, _ in pairs], [each for _, each in pairs])
        if kept.x is None:
            return None
        # An input that the output does not depend on still owes the stage before a message.
        dx = tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in kept.x)
        return dx[0] if kept.single else dx

    def replay(self, microbatch: Callable[[], object]) -> None:
        """A forward and its backward, both at once."""
        microbatch()

    def drop(self, mb: int) -> None:
        """Microbatch `mb` comes no further: let go of what was kept for it, if anything was."""
        self._kept.pop(mb, None)

    def backward_input(self, mb: int, dy: Passed | None) -> Passed | None:
        """Like `backward`, but the weight gradients that layers defer wait for `backward_weight(mb)`."""
        with self._deferred.collect(self.index, mb):
            return self.backward(mb, dy)

    def backward_weight(self, mb: int) -> None:
        """Add the weight gradients of microbatch `mb` that were deferred."""
        self._deferred.run(self.index, mb)
