"""AdamW on flat masters: one long fp32 vector per bucket, whatever the dtype of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stretto.distributed.data_parallel import DataParallel
from stretto.params import Slice, fill, slices


class AdamW:
    """Decoupled weight decay (Loshchilov and Hutter, 2019), all of it in one pass over memory.

    Where parameters are narrower than fp32 the optimizer holds an fp32 master of each bucket and rounds it into the
    parameters with every step; otherwise the bucket's weights are the master. `fuse` makes one kernel of the update,
    which reads gradient, master and moments and writes the last three and the weights: 30 bytes for a bf16 weight.
    """

    def __init__(
        self,
        weights: DataParallel,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        fuse: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    ) -> None:
        self.weights, self.betas, self.eps, self.weight_decay = weights, betas, eps, weight_decay
        self.steps = 0
        self.masters = [
            bucket.weights if bucket.weights.dtype == bucket.grad_dtype else bucket.weights.to(bucket.grad_dtype)
            for bucket in weights.all_buckets
        ]
        self.moments = [(torch.zeros_like(master), torch.zeros_like(master)) for master in self.masters]
        self._update: Callable[..., None] = _update if fuse is None else fuse(_update)

    def initialize(self, seed: int) -> None:
        """Draw the initial weights into the masters, and round them into the parameters."""
        fill(self.weights.declared, seed, lambda p: self._stored("model", p))
        self._publish()

    @torch.no_grad()
    def step(self, lr: float, scale: Tensor | None = None) -> None:
        """Update masters and parameters from `scale` [] times the buckets' gradients."""
        self.steps += 1
        corrections = lr / (1 - self.betas[0] ** self.steps), 1 - self.betas[1] ** self.steps
        factor = 1.0 if scale is None else scale
        # Numbers that change are tensors, filled on the device: as Python's they would be compiled in.
        known: dict[tuple[bool, torch.dtype], list[Tensor]] = {}
        for bucket, master, (first, second) in zip(self.weights.all_buckets, self.masters, self.moments, strict=True):
            numbers = known.setdefault((bucket.weight_decay, master.dtype), [])
            if not numbers:
                one = torch.ones((), dtype=master.dtype, device=master.device)
                keep = 1 - lr * (self.weight_decay if bucket.weight_decay else 0.0)
                numbers += [(one * number).to(one) for number in (factor, keep, *corrections)]
            rounded = bucket.weights if bucket.weights is not master else None
            self._update(master, rounded, bucket.grads, first, second, *numbers, self.betas, self.eps)

    def slices(self) -> list[Slice]:
        """This rank's slices of the masters, under `model/`, and of the moments, under `exp_avg/` and `exp_avg_sq/`."""
        kinds: Sequence[str] = ("model", "exp_avg", "exp_avg_sq")
        position = self.weights.position()
        return [
            piece
            for kind in kinds
            for piece in slices(
                self.weights.declared,
                lambda p, kind=kind: self._stored(kind, p),  # type: ignore[misc]
                position,
                prefix=f"{kind}/",
            )
        ]

    def loaded(self, steps: int) -> None:
        """The slices were filled from a checkpoint of `steps` updates: make the parameters follow."""
        self.steps = steps
        self._publish()

    def _publish(self) -> None:
        with torch.no_grad():
            for bucket, master in zip(self.weights.all_buckets, self.masters, strict=True):
                if bucket.weights is not master:
                    bucket.weights.copy_(master)

    def _stored(self, kind: str, param: nn.Parameter) -> Tensor:
        """The part of a flat vector that belongs to a stored parameter."""
        bucket = self.weights.bucket_of(param)
        n = self.weights.all_buckets.index(bucket)
        flat = {"model": self.masters[n], "exp_avg": self.moments[n][0], "exp_avg_sq": self.moments[n][1]}[kind]
        return bucket.view(flat, param)


def _update(
    master: Tensor,
    rounded: Tensor | None,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    scale: Tensor,
    keep: Tensor,
    rate: Tensor,
    correction: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One AdamW step in place on vectors [n]: `keep` is 1 - lr * decay, `rate` lr / (1 - beta1^t), `correction`
    1 - beta2^t. `rounded` gets the rounded master."""
    grad = grad * scale
    first.lerp_(grad, 1 - betas[0])
    second.lerp_(grad * grad, 1 - betas[1])
    master.mul_(keep).sub_(rate * first / ((second / correction).sqrt() + eps))
    if rounded is not None:
        rounded.copy_(master)
