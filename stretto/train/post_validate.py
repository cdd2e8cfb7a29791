"""Updates that do not wait for the norm of all gradients, and are taken back where it was too long.

The clip factor needs the norm over all ranks, so that no rank of a pipeline could begin the next step before the last
one has its gradients. Mostly nothing is clipped: each rank then updates its weights as if, the norm arrives during the
first forwards of the next step, and before the first of its gradients the update is proven. Only where the norm was
above the limit it is made again with the right factor, and the step that was under way with the wrong weights is run
again (Qi et al., "Zero Bubble Pipeline Parallelism", 2023).

Until then the gradients are there, so nothing need be copied: the weights alone are written at first, and masters and
state when the factor is known, by the same kernel to the same bits. Where an update cannot be made in two (weights that
are their own masters, other rules than AdamW) masters and state are copied before it, and put back.
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
from stretto.streams import Stream
from stretto.train.step import Stepper, StepResult, sum_over_world_async
from stretto.world import Work


@dataclass
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
    factor: Tensor | None = None
    told: Tensor | None = None
    """The factor [], on the host when it has been waited for."""

    def read(self) -> None:
        """What follows in the current stream has the factor."""
        self.factor = clip_factor(self.norm.wait(), self.limit)
        self.told = None if self.factor is None else self.factor.to("cpu", non_blocking=True)
        self.work.wait()


class PostValidated(Stepper):
    """A stepper whose updates are proven in the next step, before its first gradient, or by `settle`.

    After a step that was clipped the next one waits for its norm as any other, so that a run whose gradients are long
    pays once and not in every step. Raises ValueError where gradients are sharded, or the optimizer is a foreign one.
    """

    proven = False

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        if self.weights.sharding.grads:
            raise ValueError("updates can be proven later where each rank keeps its gradients: sharding none or zero1")
        if not isinstance(self.optimizer, FlatOptimizer):
            raise ValueError(f"updates by a {type(self.optimizer).__name__} cannot be taken back")
        self.flat: FlatOptimizer = self.optimizer
        self.taken_back = 0
        """Updates that were made again."""
        self._unproven: _Unproven | None = None
        self._trusting = self._in_vain = False
        self._aside = Stream.of(self.state.world.device)
        self._current = Stream.current(self.state.world.device)
        state = [flat for flats in self.flat.state.values() for flat in flats]
        self._flats = [] if self.flat.in_two else [*self.flat.masters, *state]
        self._kept = [torch.empty_like(flat) for flat in self._flats]

    def gradients(self, microbatches: Sequence[Any]) -> Tensor:
        """As `Stepper`; the update before is proven when the first of them comes, and if it was wrong all of it is run
        once more with the right weights."""
        self._in_vain = False
        self.executor.before_gradients = self._prove
        self.further.zero_()
        with self.steady():
            loss = self.executor.step(microbatches)
        if self._in_vain:
            self._correct()
            return self.gradients(microbatches)
        self.weights.finish()
        return loss

    def update(self, loss: Tensor, lr: float, *, stop: bool = False) -> StepResult:
        """Update as if nothing were clipped, unless the last step was. What it measured is there after the next one's
        gradients, or after `settle`."""
        self.settle()
        if not self._trusting:
            result = super().update(loss, lr, stop=stop)
            self._trusting = _unclipped(clip_factor(result.grad_norm, self.clip_grad))
            return result
        norm = NormSum(self.weights)
        figures, work = sum_over_world_async(loss, self.state, self.further, votes=float(stop))
        made = [torch.zeros_like(norm.squares) for _ in range(3)]
        result = StepResult(made[0], made[1], made[2], loss, self.weights.norms, torch.zeros_like(self.further))
        self._unproven = _Unproven(lr, self.clip_grad, norm, figures, work, result)
        if self._aside.stream is not None:  # a GPU waits there, and what computes goes on
            self._aside.follows(self._current)
            with self._aside.used():
                self._unproven.read()
        self.before_update()
        for kept, flat in zip(self._kept, self._flats, strict=True):
            kept.copy_(flat)
        one = None if self.clip_grad == 0 else torch.ones_like(norm.squares)
        self.flat.step(lr, one, write="weights" if self.flat.in_two else "all")
        return result

    def settle(self) -> bool:
        """Wait for the norm of the last update, and make it again where it was wrong; False if it was. All together."""
        if self._unproven is None:
            return True
        if not (right := self._is_right(self._unproven)):
            self._correct()
        else:
            self._complete(self._unproven)
        return right

    def _prove(self) -> None:
        """No gradient of this step is there yet, and those of the one before still are."""
        if self._unproven is not None:
            if not self._is_right(self._unproven):
                self._in_vain = True
                self.weights.ignore(True)
                return
            self._complete(self._unproven)
        self.weights.zero()

    def _is_right(self, made: _Unproven) -> bool:
        """Whether nothing had to be clipped. The host waits for the norm, but for nothing that was launched since."""
        if self._aside.stream is None:
            made.read()
        self._aside.synchronize()
        self._current.follows(self._aside)
        if made.factor is not None:
            self._aside.hand_over(made.factor)
        result, figures = made.result, made.figures
        for to, value in (
            (result.loss, figures[0]),
            (result.grad_norm, made.norm.squares.sqrt()),
            (result.votes, figures[1]),
            (result.further, figures[2:].view_as(self.further)),
        ):
            to.copy_(value)
        self._trusting = _unclipped(made.told)
        return self._trusting

    def _complete(self, made: _Unproven) -> None:
        """The update was right: what was not written of it is."""
        self._unproven = None
        if self.flat.in_two:
            self.flat.step(made.lr, made.factor, write="rest")

    @torch.no_grad()
    def _correct(self) -> None:
        """Make the update once more with the right factor; the gradients that it needs are there."""
        made, self._unproven = self._unproven, None
        assert made is not None
        self.weights.ignore(False)
        self.weights.settle()  # nothing is on its way from weights that are about to change
        for kept, flat in zip(self._kept, self._flats, strict=True):
            flat.copy_(kept)
        self.flat.steps -= not self.flat.in_two
        self.flat.step(made.lr, made.factor)
        self.taken_back += 1


def _unclipped(factor: Tensor | None) -> bool:
    return factor is None or bool(factor == 1.0)
