"""`stretto` with a fault in what one rank communicates, which Gloo itself would let pass, or hang on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stretto.cli import main
from stretto.collectives import all_reduce
from stretto.train import step
from stretto.train.loop import Loop
from stretto.train.step import Stepper
from stretto.world import Axis, Work


def one_more_sum(argv: Sequence[str]) -> int:
    """In each step, on all ranks alike: nothing but the volume tells."""
    before = Stepper.step

    def after(self: Stepper, *args: Any, **more: Any) -> Any:
        all_reduce(torch.ones(3), self.weights.state.axis("dp"))
        return before(self, *args, **more)

    Stepper.step = after  # type: ignore[method-assign]
    return main(argv)


def another_shape(argv: Sequence[str]) -> int:
    """On rank 1, of as many bytes: nothing but the comparison of the ranks tells."""
    before = step.all_reduce_

    def after(x: Tensor, axis: Axis) -> Work:
        shape = (-1, 1) if axis.rank == 1 else (-1,)
        return before(x.view(shape), axis)  # guilty

    step.all_reduce_ = after  # type: ignore[attr-defined]
    return main(argv)


def one_call_more(argv: Sequence[str]) -> int:
    """On rank 2, as it begins its third step: the others are at another call, and all would wait."""
    begin = Loop._step

    def begin_step(self: Loop) -> Any:
        if (self.train_state.step, self.state.world.rank) == (2, 2):
            all_reduce(torch.ones(1), self.state.axis("dp"))  # guilty
        return begin(self)

    Loop._step = begin_step  # type: ignore[method-assign]
    return main(argv)


def a_flipped_bit(argv: Sequence[str]) -> int:
    """On rank 1, after its third step: the last bit of one weight, which changes no figure that is shown."""
    begin = Loop._step

    def step_and_flip(self: Loop) -> Any:
        done = begin(self)
        if (self.train_state.step, self.state.world.rank) == (3, 1):
            weight = next(p for p in self.assembly.optimizer.slices() if p.name.endswith("down_proj.weight"))
            weight.tensor.view(torch.int32)[0, 0] ^= 1
        return done

    Loop._step = step_and_flip  # type: ignore[method-assign]
    return main(argv)
