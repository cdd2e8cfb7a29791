"""Deferred weight gradients: one queue, which a backward split into I and W and tensor-parallel overlap share.

Autograd makes both gradients of a GEMM in one node. A layer that was given the queue leaves the second with it:

    def backward(ctx, dy):                          # of y = x w^T
        x, w = ctx.saved_tensors[0], ctx.weight
        dw = ctx.deferred.gradient(w, partial(wgrad, dy, x))       # None while it is deferred
        return dy @ w, dw, None

An I is then an ordinary backward, which frees the whole graph but for these x and dy, and a W runs what was left.
Layers that know nothing of it stay exact: all of their gradients come with the I. Outside of an I one weight gradient
at a time may be deferred until a collective is in flight that it covers.

Two traps: under a checkpoint a saved `w` is a copy, whose gradient would be lost, so a layer keeps its own. And
autograd runs the post-accumulate hooks of `w` during the I too, when nothing was accumulated. A hook that takes the
gradient away each time, leaving None, tells the two apart; one that counts its calls does not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

Key = tuple[int, int]
"""Stage and microbatch."""


class Deferred:
    """The weight gradients of one rank that are still to be computed, in the order of their I."""

    def __init__(self) -> None:
        self._jobs: dict[Key, deque[tuple[Tensor, Callable[[], None]]]] = {}
        self._collecting: deque[tuple[Tensor, Callable[[], None]]] | None = None
        self._behind: Callable[[], None] | None = None

    @property
    def collecting(self) -> bool:
        """Whether an I runs."""
        return self._collecting is not None

    def defer(self, weight: Tensor, job: Callable[[], None]) -> bool:
        """Keep `job` for the W of the I that runs; False outside of one, and then it is the caller's."""
        if self._collecting is None:
            return False
        self._collecting.append((weight, job))
        return True

    def gradient(self, weight: Tensor, compute: Callable[[], Tensor]) -> Tensor | None:
        """The gradient of `weight`, computed; or None during an I: the W adds it, hooks included."""

        def add() -> None:
            # A backward that begins at the weight: it may be a view, or carry hooks that count gradients.
            torch.autograd.backward(get_gradient_edge(weight), compute())

        return None if self.defer(weight, add) else compute()

    def behind(self, job: Callable[[], None]) -> None:
        """Keep `job` until a collective is in flight, no longer than until the next: it holds what it multiplies."""
        self.flush()
        self._behind = job

    def flush(self) -> None:
        """Do what was kept for a collective to cover."""
        if self._behind is not None:
            job, self._behind = self._behind, None
            job()

    @contextmanager
    def collect(self, stage: int, mb: int) -> Iterator[None]:
        """What is deferred in this context waits for `run(stage, mb)`."""
        self.flush()
        self._collecting = self._jobs[stage, mb] = deque()
        try:
            yield
        finally:
            self._collecting = None

    def run(self, stage: int, mb: int) -> None:
        """Compute what was deferred by the I of this stage and microbatch."""
        jobs = self._jobs.pop((stage, mb))
        while jobs:
            jobs.popleft()[1]()  # one by one, so that each lets go of its x and dy

    def clear(self) -> None:
        """A step begins: what is left of one that did not come to its end is not for this one."""
        self._jobs.clear()
        self._behind = None

    def waiting(self, stage: int) -> tuple[int, ...]:
        """Microbatches of the stage whose weight gradients are still to be computed."""
        return tuple(mb for of, mb in self._jobs if of == stage)

    def weights(self) -> set[Tensor]:
        """Weights with a gradient that is still to be computed by a W."""
        return {weight for jobs in self._jobs.values() for weight, _ in jobs}
