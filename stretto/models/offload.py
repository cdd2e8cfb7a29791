"""What enters a block waits for its backward in the host's memory, for a block that is recomputed there.

Long sequences are limited by it: 8B at 512k tokens keeps 4 GiB of bf16 for each of 32 blocks. The tensor stays, its
memory comes and goes: it leaves while its block computes, and comes back while the block behind it is computed back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stretto.streams import Stream
from stretto.world import Work


class Offload:
    """The inputs of the blocks of one forward. The last stays: its backward is next."""

    def __init__(self) -> None:
        self._last: _Away | None = None

    def __call__(self, block: nn.Module, x: Tensor, *rest: Any, stays: bool = False) -> Tensor:
        """`block(x, *rest)` under a checkpoint, after which x has no memory on the device until its backward."""
        if stays or not _alone(x) or not torch.is_grad_enabled():
            kept: _Away | _Stays = _Stays(self._last)
        else:
            kept = self._last = _Away(x, self._last)

        def compute(x: Tensor, *rest: Any) -> Tensor:
            kept.here()
            y: Tensor = block(x, *rest)
            return y

        out: Tensor = checkpoint(compute, x, *rest, use_reentrant=False, preserve_rng_state=False)
        kept.free()
        return out


class _Stays:
    """A tensor that stays; `before` as below."""

    def __init__(self, before: _Away | None) -> None:
        self.before, self._forward = before, True

    def free(self) -> None:
        """The forward is over."""
        self._forward = False

    def here(self) -> None:
        """In the backward, begin to bring back the one before."""
        if not self._forward and self.before is not None:
            self.before.fetch()


class _Away:
    """One tensor, and its copy on the host; `before` is the input of the block that is computed back after this one."""

    def __init__(self, x: Tensor, before: _Away | None) -> None:
        self.x, self.before, self.size = x, before, x.untyped_storage().nbytes()
        self.host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        self._stream = Stream.of(x.device)
        self._done = self._copy(self.host, x)
        self._coming = False

    def free(self) -> None:
        """Let go of its memory, once it is copied: the device waits for that, not the host."""
        self._done.wait()
        self.x.untyped_storage().resize_(0)

    def fetch(self) -> None:
        """Begin to bring it back."""
        if not self._coming and self.x.untyped_storage().nbytes() == 0:
            self._coming = True
            self.x.untyped_storage().resize_(self.size)
            self._done = self._copy(self.x.data, self.host)

    def here(self) -> None:
        """Have it back, and begin to bring back the one before."""
        self.fetch()
        if self._coming:
            self._done.wait()
            if self.before is not None:
                self.before.fetch()

    def _copy(self, to: Tensor, source: Tensor) -> Work:
        self._stream.follows(Stream.current(self.x.device))
        with self._stream.used():
            to.copy_(source.detach(), non_blocking=True)
        return self._stream.launched()


def _alone(x: Tensor) -> bool:
    """Whether a tensor is all that its storage holds: what others see of it must not vanish."""
    return x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes
