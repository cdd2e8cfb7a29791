"""What data parallelism keeps in pieces, one on each rank, instead of whole on every rank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True)
class Sharding:
    """Whether parameters, gradients and optimizer state are sharded over the data-parallel ranks.

    Gradients in pieces only make sense if the optimizer updates pieces, and parameters in pieces only if
    their gradients are: any other combination raises `ValueError`.

    Sharded parameters that were gathered stay whole while the stage is used again within `keep` computations of other
    stages (None: until its last use in the step; 0: they are freed unless the next computation is the stage's too).
    UNSHARD stands `ahead` computations before the first use, so that gathers are staggered over the warm-up.
    Sharded gradients are reduced once per step, or with `reduce_each` in each microbatch.
    """

    params: bool = False
    grads: bool = False
    state: bool = False
    keep: int | None = None
    ahead: int = 1
    reduce_each: bool = False

    def __post_init__(self) -> None:
        if self.params > self.grads or self.grads > self.state:
            raise ValueError(
                f"params={self.params}, grads={self.grads}, state={self.state}: sharded parameters need "
                "sharded gradients, and those a sharded optimizer state; take DDP, ZERO1, ZERO2 or FSDP"
            )
        if self.ahead < 0 or (self.keep is not None and self.keep < 0):
            raise ValueError(f"ahead={self.ahead}, keep={self.keep}: numbers of computations are not negative")
        if self.keep is not None and not self.params:
            raise ValueError(f"keep={self.keep} has no effect: the parameters are not sharded; leave it out")
        if self.reduce_each and not self.grads:
            raise ValueError("reduce_each has no effect: the gradients are not sharded; leave it out")


DDP: Final = Sharding()
ZERO1: Final = Sharding(state=True)
ZERO2: Final = Sharding(grads=True, state=True)
FSDP: Final = Sharding(params=True, grads=True, state=True)

MODES: Final = MappingProxyType(
    {
        "none": DDP,
        "zero1": ZERO1,
        "zero2": replace(ZERO2, reduce_each=True),
        "fsdp": replace(FSDP, keep=0, reduce_each=True),
    }
)
"""By the names of `parallel.sharding`."""
