"""An optimizer whose updates also bring the experts into balance."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from stretto.experts import Balance
from stretto.params import Slice
from stretto.train.step import Optimizer


class Balanced:
    """The inner optimizer, and after each of its updates a step of the balance; checkpoints hold both."""

    def __init__(self, inner: Optimizer, balance: Balance) -> None:
        self.inner, self.balance = inner, balance

    def initialize(self, seed: int, wanted: Callable[[str], bool] = lambda _: True) -> None:
        """As the inner one: routers begin with biases and counts of zero."""
        self.inner.initialize(seed, wanted)

    def step(self, lr: float, scale: Tensor | None = None) -> None:
        """An update, from the gradients and from the counts of the same global batch."""
        self.inner.step(lr, scale)
        self.balance.step()

    def slices(self) -> list[Slice]:
        """Those of both."""
        return [*self.inner.slices(), *self.balance.slices()]

    def loaded(self, steps: int) -> None:
        """The slices were filled."""
        self.inner.loaded(steps)
