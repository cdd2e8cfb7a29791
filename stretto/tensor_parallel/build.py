"""`Build`: what every parallel layer is built with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stretto.world import Axis


class Accumulators(Protocol):
    """Where layers add weight gradients up themselves, in fp32 or wider, instead of handing them to autograd.

    A matrix product can add to what is there as it writes; through autograd the product is written in the dtype of
    the weight, read, and added in a second pass over memory that also rounds it.
    """

    def expect(self, weight: nn.Parameter) -> None:
        """One more place uses `weight`: each backward of it calls `add` once."""

    def add(self, weight: nn.Parameter, write: Callable[[Tensor, bool], object]) -> None:
        """Call `write(total, fresh)`, which adds a gradient to `total`, or sets it where `fresh`: a new step began."""


def unfused(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it is, one kernel for each operation in it."""
    return function


@dataclass(frozen=True)
class Build:
    """Where a layer lies, how it is stored, and how it computes.

    Under `sequence_parallel` what lies outside the column -> row pairs works on this rank's part of the sequence.
    `seed` is that of the dropout masks. `fuse` makes one kernel of a function of several elementwise operations
    (`torch.compile`, or nothing). With `again` the cheap operations in front of a matrix product are not kept for the
    backward but done once more in it. Weight gradients go to `accumulators`, or where there are none to autograd.
    """

    tp: Axis
    sequence_parallel: bool
    dtype: torch.dtype
    device: torch.device | str = "cpu"
    seed: int = 0
    fuse: Callable[[Callable[..., Any]], Callable[..., Any]] = unfused
    again: bool = False
    accumulators: Accumulators | None = None
