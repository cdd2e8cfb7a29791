"""One optimizer step, and one evaluation, over any stages: what training loops are built from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from stretto.collectives import all_reduce_, nothing
from stretto.distributed import DataParallel, clip_factor, grad_norm
from stretto.distributed.watch import GradientWatch, Seen
from stretto.parallel_state import ParallelState
from stretto.params import Slice
from stretto.pipeline_parallel import Executor
from stretto.world import Work

OnNonfinite = Literal["stop", "trace", "skip"]
"""What follows a loss or gradient that is no number: the run ends; and names the microbatch; or goes on without it."""


class Optimizer(Protocol):
    """What training asks of an optimizer over the flat storage of `DataParallel`."""

    def initialize(self, seed: int, wanted: Callable[[str], bool] = ...) -> None:
        """Draw the initial weights, of the names that are `wanted`, and make the parameters follow."""

    def step(self, lr: float, scale: Tensor | None = None) -> None:
        """Update from `scale` [] times the gradients."""

    def skip(self) -> None:
        """This update is counted, and not made."""

    def slices(self) -> list[Slice]:
        """All that a checkpoint holds: masters under `model/`, and the optimizer's state."""

    def loaded(self, steps: int) -> None:
        """The slices were filled from a checkpoint of `steps` updates."""


@dataclass(frozen=True)
class StepResult:
    """What a step measured, still on the device: nothing here makes the host wait.

    `loss` [] and `grad_norm` [] (before clipping) are those of the whole global batch, the same on every rank;
    `votes` [] counts the ranks that asked for a stop.
    """

    loss: Tensor
    grad_norm: Tensor
    votes: Tensor
    own_loss: Tensor
    """This rank's part [] of it."""
    norms: tuple[list[str], Tensor]
    """Names of the gradients that this rank counts, and their norms [n]."""
    further: Tensor = field(default_factory=lambda: torch.zeros((2, 0), dtype=torch.float64))
    """[2, D] of the tokens after the next, the same on every rank: losses, and what their tokens are of all."""
    seen: Seen = field(default_factory=list)
    """Gradients of each microbatch, where they are watched."""
    skipped: bool = False
    """The weights stay as they are, on all ranks."""


class Stepper:
    """Forwards and backwards as the program says, reductions, clipping, the update.

    The program runs in a context of `steady`, within which weights do not change.
    """

    def __init__(
        self,
        executor: Executor,
        weights: DataParallel,
        optimizer: Optimizer,
        *,
        clip_grad: float,
        steady: Callable[[], AbstractContextManager[object]] = nullcontext,
        on_nonfinite: OnNonfinite = "stop",
    ) -> None:
        self.executor, self.weights, self.optimizer, self.clip_grad = executor, weights, optimizer, clip_grad
        self.state, self.steady, self.on_nonfinite = weights.state, steady, on_nonfinite
        self.watch = None if on_nonfinite == "stop" else GradientWatch()
        for bucket in weights.all_buckets:
            bucket.watch = self.watch
        self.further = torch.zeros((2, 0), dtype=torch.float64, device=self.state.world.device)
        """[2, D]: what the program adds to it in a step, losses beside the one that it returns."""
        self.before_update: Callable[[], object] = nothing
        """Called when the gradients are there, and the weights are still those of the step before."""

    proven = True
    """Whether what a step measured is on its way when `step` returns; else after the next step, or `settle`."""

    def settle(self) -> bool:
        """Make sure that the last update is the final one; False if it was not. All ranks together."""
        return True

    def gradients(self, microbatches: Sequence[Any]) -> Tensor:
        """Run the program. Returns the loss [] of this rank's part; gradients are whole, not clipped."""
        self.weights.zero()
        self.further.zero_()
        with self.steady():
            loss = self.executor.step(microbatches)
        self.weights.finish()
        return loss

    def step(self, microbatches: Sequence[Any], lr: float, *, stop: bool = False) -> StepResult:
        """One update. `stop` is this rank's vote for ending the run after it."""
        return self.update(self.gradients(microbatches), lr, stop=stop)

    def update(self, loss: Tensor, lr: float, *, stop: bool = False) -> StepResult:
        """Clip, and update the weights; `loss` [] is this rank's part, as `gradients` returned it."""
        norm = grad_norm(self.weights)
        total = sum_over_world(loss, self.state, self.further, votes=float(stop))
        # Both are sums over all ranks, which therefore agree; the host waits for them only where it may skip.
        skipped = self.on_nonfinite == "skip" and not bool(torch.isfinite(total[0]) & torch.isfinite(norm))
        self.before_update()
        if skipped:
            self.optimizer.skip()
        else:
            self.optimizer.step(lr, clip_factor(norm, self.clip_grad))
        seen = self.watch.take() if self.watch else []
        further = total[2:].view_as(self.further)
        return StepResult(total[0], norm, total[1], loss, self.weights.norms, further, seen, skipped)


def sum_over_world(loss: Tensor, state: ParallelState, further: Tensor | None = None, *, votes: float = 0.0) -> Tensor:
    """[2 + n]: the sum of the ranks' losses, of their votes, and of what else [..] they tell, in fp64 on every rank by
    one small all-reduce.

    Tensor-parallel ranks repeat one loss, so only the first of them adds it.
    """
    packed, work = sum_over_world_async(loss, state, further, votes=votes)
    work.wait()
    return packed


def sum_over_world_async(
    loss: Tensor, state: ParallelState, further: Tensor | None = None, *, votes: float = 0.0
) -> tuple[Tensor, Work]:
    """The same, on its way: there when the work is over."""
    mine = loss.detach().double()
    told = torch.cat(
        [mine[None], torch.full_like(mine, votes)[None], *([] if further is None else [further.flatten()])]
    )
    packed = told * (state.axis("tp").rank == 0)
    packed[1].fill_(votes)  # `packed[1] = votes` would copy a tensor of the host, for which it waits
    return packed, all_reduce_(packed, state.axis("tp", "cp", "dp", "pp"))


@torch.no_grad()
def evaluate(executor: Executor, microbatches: Sequence[Any], state: ParallelState) -> Tensor:
    """The loss [] of a batch by an executor whose program has only forwards; the same on every rank."""
    return sum_over_world(executor.step(microbatches), state)[0]
