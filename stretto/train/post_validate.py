"""Updates that do not wait for the norm of all gradients, and are taken back where it was too long.

The clip factor needs the norm over all ranks, so that no rank of a pipeline could begin the next step before the last
one has its gradients. Mostly nothing is clipped: each rank then updates as if, the norm arrives during the next step,
and only where it was above the limit the update is taken back, bit for bit, made again with the right factor, and the
step that was under way with the wrong weights is run again. (Qi et al., "Zero Bubble Pipeline Parallelism", 2023, have
the idea; there the check comes before the next backward.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stretto.distributed import Optimizer as FlatOptimizer
from stretto.distributed import clip_factor
from stretto.distributed.norm import NormSum
from stretto.train.step import Stepper, StepResult, sum_over_world_async
from stretto.world import Work


@dataclass(frozen=True)
class _Unproven:
    """An update that was made before its norm was known, and what it was made from."""

    lr: float
    limit: float
    norm: NormSum
    figures: Tensor
    """Loss, votes and further losses, once `work` is over."""
    work: Work
    result: StepResult
    """Its tensors are filled when the norm is known."""


class PostValidated(Stepper):
    """A stepper whose updates are proven one step later, or by `settle`.

    A copy of gradients, masters and the optimizer's state is held for it. After a step that was clipped the next one
    waits for its norm as any other, so that a run whose gradients are long pays once and not in every step. Raises
    ValueError where gradients are sharded, or the optimizer is a foreign one.
    """

    proven = False

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        if self.weights.sharding.grads:
            raise ValueError("updates can be proven later where each rank keeps its gradients: sharding none or zero1")
        if not isinstance(self.optimizer, FlatOptimizer):
            raise ValueError(f"updates by a {type(self.optimizer).__name__} cannot be taken back")
        self.taken_back = 0
        """Updates that were made again."""
        self._unproven: _Unproven | None = None
        self._trusting = False
        self._flats = [
            *(bucket.grad for bucket in self.optimizer.buckets if not bucket.frozen),
            *self.optimizer.masters,
            *(flat for flats in self.optimizer.state.values() for flat in flats),
        ]
        self._kept = [torch.empty_like(flat) for flat in self._flats]

    def step(self, microbatches: Sequence[Any], lr: float, *, stop: bool = False) -> StepResult:
        """One update; what it measured is there after the next one, or after `settle`."""
        loss = self.gradients(microbatches)
        if not self.settle():
            loss = self.gradients(microbatches)  # anew, from the right weights
        return self.update(loss, lr, stop=stop)

    def update(self, loss: Tensor, lr: float, *, stop: bool = False) -> StepResult:
        """Update as if nothing were clipped, unless the last step was."""
        self.settle()
        if not self._trusting:
            result = super().update(loss, lr, stop=stop)
            self._trusting = self._unclipped(clip_factor(result.grad_norm, self.clip_grad))
            return result
        norm = NormSum(self.weights)
        figures, work = sum_over_world_async(loss, self.state, self.further, votes=float(stop))
        made = [torch.zeros_like(norm.squares) for _ in range(3)]
        result = StepResult(made[0], made[1], made[2], loss, self.weights.norms, torch.zeros_like(self.further))
        self.before_update()
        for kept, flat in zip(self._kept, self._flats, strict=True):
            kept.copy_(flat)
        self.optimizer.step(lr, None if self.clip_grad == 0 else torch.ones_like(norm.squares))
        self._unproven = _Unproven(lr, self.clip_grad, norm, figures, work, result)
        return result

    def settle(self) -> bool:
        """Wait for the norm of the last update, and make it again where it was wrong; False if it was. All together."""
        made, self._unproven = self._unproven, None
        if made is None:
            return True
        norm = made.norm.wait()
        made.work.wait()
        for to, value in zip(
            (made.result.loss, made.result.grad_norm, made.result.votes, made.result.further),
            (made.figures[0], norm, made.figures[1], made.figures[2:].view_as(self.further)),
            strict=True,
        ):
            to.copy_(value)
        factor = clip_factor(norm, made.limit)
        self._trusting = self._unclipped(factor)
        if not self._trusting:
            self._take_back()
            self.optimizer.step(made.lr, factor)
        return self._trusting

    @torch.no_grad()
    def _take_back(self) -> None:
        assert isinstance(self.optimizer, FlatOptimizer)
        self.weights.settle()  # nothing is on its way from masters that are about to change
        for kept, flat in zip(self._kept, self._flats, strict=True):
            flat.copy_(kept)
        self.optimizer.steps -= 1
        self.taken_back += 1

    @staticmethod
    def _unclipped(factor: Tensor | None) -> bool:
        return factor is None or bool(factor == 1.0)
