"""Tensors whose memory comes and goes while they, and all views of them, stay.

An autograd graph keeps views of weights that are freed after the forward and gathered again before the backward: they
see what is there then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stretto.world import PeerMemory


def free(x: Tensor) -> None:
    """Give the memory of `x`, and of all that shares it, back."""
    x.untyped_storage().resize_(0)


def allocate(x: Tensor) -> None:
    """Memory for `x`, which starts at the beginning of its storage; what is in it is undefined."""
    x.untyped_storage().resize_(x.numel() * x.element_size())


def here(x: Tensor) -> bool:
    """Whether `x` has memory; a tensor on the device meta has none."""
    return not x.is_meta and (x.numel() == 0 or x.untyped_storage().nbytes() > 0)


def zeros(numel: int, like: Tensor, dtype: torch.dtype, peers: PeerMemory | None) -> Tensor:
    """[numel] on the device of `like`, where the other ranks can read it if there is memory for that."""
    if peers is None or numel == 0:
        return torch.zeros(numel, dtype=dtype, device=like.device)
    return peers.empty(numel, dtype)
