"""AdamW on flat masters: one long fp32 vector per bucket, whatever the dtype of the parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stretto.distributed.data_parallel import DataParallel
from stretto.params import Slice, fill, slices


class AdamW:
    """Decoupled weight decay (Loshchilov and Hutter, 2019) through torch's fused kernel.

    Where parameters are narrower than fp32 the optimizer holds an fp32 master of each bucket and rounds it into the
    parameters after every step; otherwise the bucket's weights are the master.
    """

    def __init__(self, weights: DataParallel, *, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self.weights = weights
        self.masters: list[nn.Parameter] = []
        for bucket in weights.all_buckets:
            wide = bucket.weights if bucket.weights.dtype == bucket.grad_dtype else bucket.weights.to(bucket.grad_dtype)
            master = nn.Parameter(wide)
            master.grad = bucket.grads
            self.masters.append(master)
        groups = [
            {"params": [master], "weight_decay": weight_decay if bucket.weight_decay else 0.0}
            for bucket, master in zip(weights.all_buckets, self.masters, strict=True)
        ]
        # torch refuses a list without parameters, which an empty stage has; a group without any is fine.
        self._adam = torch.optim.AdamW(groups or [{"params": []}], betas=betas, eps=eps, fused=True)
        for master in self.masters:  # the moments exist from the start, so that a checkpoint has one form
            self._adam.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
            }

    def initialize(self, seed: int) -> None:
        """Draw the initial weights into the masters, and round them into the parameters."""
        fill(self.weights.declared, seed, lambda p: self._stored("model", p))
        self._publish()

    def step(self, lr: float) -> None:
        """Update masters and parameters from the bucket's gradients."""
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        self._publish()

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
        for master in self.masters:
            self._adam.state[master]["step"].fill_(steps)
        self._publish()

    def _publish(self) -> None:
        with torch.no_grad():
            for bucket, master in zip(self.weights.all_buckets, self.masters, strict=True):
                if master.data_ptr() != bucket.weights.data_ptr():
                    bucket.weights.copy_(master)

    def _stored(self, kind: str, param: nn.Parameter) -> Tensor:
        """The part of a flat vector that belongs to a stored parameter."""
        bucket = self.weights.bucket_of(param)
        master = self.masters[self.weights.all_buckets.index(bucket)]
        flat = master.data if kind == "model" else self._adam.state[master][kind]
        return bucket.view(flat, param)
