"""Which gradients of a bucket there are."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor, nn

from stretto.params import Declared
from stretto.schedule import Sharding
from stretto.world import Work


class Arrivals:
    """What a bucket knows of its parameters' gradients."""

    items: tuple[Declared, ...]
    weights: Tensor
    sharding: Sharding
    frozen: bool
    sent: bool
    _reduced: bool
    _waiting: set[nn.Parameter] | None
    _work: Work | None
    _spans: dict[nn.Parameter, range]
    _versions: dict[nn.Parameter, int]
    _fresh: set[nn.Parameter]
    """None yet in what is there of the bucket's gradients."""
    _without: set[nn.Parameter]
    """None yet in this step."""

    @property
    def params(self) -> tuple[nn.Parameter, ...]:
        """The parameters in it."""
        return tuple(self._spans)

    @property
    def due(self) -> bool:
        """Whether a sum is still owed to the step: it was announced, or there was none yet."""
        return not (self.sent or self.frozen) and (self._waiting is not None or not self._reduced)

    @property
    def summed(self) -> bool:
        """Whether the gradients are those of all ranks, and here."""
        return self.frozen or (not self.due and self._work is None)

    @property
    def missing(self) -> list[str]:
        """Parameters that got no gradient in this step."""
        return [item.name for item in self.items if item.param in self._without and not self.frozen]

    @property
    def late(self) -> list[str]:
        """Parameters with gradients that came after the last sum and were not announced."""
        waits = self.sharding.grads and not self.sent and len(self._fresh) < len(self._spans)
        return [item.name for item in self.items if waits and item.param not in self._fresh]

    @property
    def progress(self) -> tuple[frozenset[nn.Parameter], frozenset[nn.Parameter]]:
        """Which parameters have no gradient yet: in what is there of `grads`, and in this step."""
        return frozenset(self._fresh), frozenset(self._without)

    @progress.setter
    def progress(self, progress: tuple[frozenset[nn.Parameter], frozenset[nn.Parameter]]) -> None:
        self._fresh, self._without = (set(each) for each in progress)

    def arm(self, only: Container[nn.Parameter] | None = None) -> None:
        """The next gradient of each parameter is the last before a sum over the ranks, or of those among `only`.

        Raises RuntimeError the second time in a step, where gradients are not sharded.
        """
        if self._waiting is not None:
            raise RuntimeError("reduce(stage) was called twice in one step: zero() must begin the next one")
        self._waiting = {p for p in self._spans if only is None or p in only}

    @property
    def replicas(self) -> tuple[str, ...]:
        """Axes that data parallelism reduces over, the same for all that is in it."""
        return self.items[0].replicas

    @property
    def full(self) -> bool:
        """Whether every last gradient is here."""
        return self._waiting is not None and not self._waiting

    @property
    def written(self) -> list[str]:
        """Parameters whose weights were replaced or written to behind the back of the bucket's shard."""
        is_view = torch._C._is_alias_of  # type: ignore[attr-defined]
        return [
            item.name
            for item in self.items
            if item.param._version != self._versions[item.param] or not is_view(item.param, self.weights)
        ]

    def name_of(self, param: nn.Parameter) -> str:
        """Of a parameter in it."""
        return next(item.name for item in self.items if item.param is param)
