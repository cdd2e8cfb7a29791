"""Weight gradients deferred: what lets a backward be split into I, for the input, and W, for the weights.

Autograd makes both gradients of a GEMM in one node. A layer that was given a `DeferredGradients` leaves the second
one with it instead:

    def backward(ctx, dy):                          # of y = x w^T
        x, w = ctx.saved_tensors
        dw = ctx.deferred.add(w, partial(outer, dy, x))        # None while it is deferred
        return dy @ w, dw, None

An I is then an ordinary backward, which frees the whole graph but for these x and dy, and a W runs what was left.
Layers that know nothing of it stay exact: all of their gradients come with the I.

One trap: autograd runs the post-accumulate hooks of `w` during the I too, when nothing was accumulated. A hook that
takes the gradient away each time, leaving None, tells the two apart; one that counts its calls does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge


class DeferredGradients:
    """The weight gradients of one stage that are still to be computed, by microbatch."""

    def __init__(self) -> None:
        self._jobs: dict[int, list[tuple[Tensor, Callable[[], Tensor]]]] = {}
        self._collecting: list[tuple[Tensor, Callable[[], Tensor]]] | None = None

    def add(self, weight: Tensor, gradient: Callable[[], Tensor]) -> Tensor | None:
        """The gradient of `weight`, computed; or None during an I, and then it is computed by the W."""
        if self._collecting is None:
            return gradient()
        self._collecting.append((weight, gradient))
        return None

    @contextmanager
    def collect(self, mb: int) -> Iterator[None]:
        """Deferred what is added in this context, for `run(mb)`."""
        self._collecting = self._jobs[mb] = []
        try:
            yield
        finally:
            self._collecting = None

    def run(self, mb: int) -> None:
        """Compute what was deferred for microbatch `mb` and add it to the weights' gradients, hooks included."""
        jobs = self._jobs.pop(mb)
        while jobs:
            weight, gradient = jobs.pop(0)  # one by one, so that each lets go of its x and dy
            # A backward that begins at the weight: it may be a view, or carry hooks that count gradients.
            torch.autograd.backward(get_gradient_edge(weight), gradient())

    @property
    def waiting(self) -> tuple[int, ...]:
        """Microbatches whose weight gradients are still to be computed."""
        return tuple(self._jobs)
