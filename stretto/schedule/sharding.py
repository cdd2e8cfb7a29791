"""What data parallelism keeps in pieces, one on each rank, instead of whole on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Sharding:
    """Whether parameters, gradients and optimizer state are sharded over the data-parallel ranks.

    Gradients in pieces only make sense if the optimizer updates pieces, and parameters in pieces only if
    their gradients are: any other combination raises `ValueError`.
    """

    params: bool = False
    grads: bool = False
    state: bool = False

    def __post_init__(self) -> None:
        if self.params > self.grads or self.grads > self.state:
            raise ValueError(
                f"params={self.params}, grads={self.grads}, state={self.state}: sharded parameters need "
                "sharded gradients, and those a sharded optimizer state; take DDP, ZERO1, ZERO2 or FSDP"
            )


DDP: Final = Sharding()
ZERO1: Final = Sharding(state=True)
ZERO2: Final = Sharding(grads=True, state=True)
FSDP: Final = Sharding(params=True, grads=True, state=True)
