"""What `param.grad` is between a backward and the update, while the gradient lies in a bucket: nothing to compute with.

Without it `torch.nn.utils.clip_grad_norm_` finds no gradients, returns 0 and clips nothing, and nobody notices.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

CLIP: Final = (
    "gradients lie in buckets of stretto, which sum them over the ranks, and not in param.grad: clip them by "
    "`sharded.optimizer(..., clip_grad=)`, whose step() returns their norm"
)


class StandIn(Tensor):
    """A tensor like `param`, without memory: to compute with it is a RuntimeError."""

    @staticmethod
    def __new__(cls, param: Tensor) -> StandIn:
        made: StandIn = torch.Tensor._make_wrapper_subclass(cls, param.shape, dtype=param.dtype, device=param.device)
        return made

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        raise RuntimeError(CLIP)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"<a gradient {list(self.shape)} in a bucket of stretto>"
