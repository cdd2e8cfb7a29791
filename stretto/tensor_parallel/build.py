"""`Build`: what every parallel layer is built with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from stretto.collectives import OverlapWith, nothing
from stretto.world import Axis, ExpertAxes

if TYPE_CHECKING:
    from stretto.tensor_parallel.exact import Slices
    from stretto.tensor_parallel.lora import Lora


class Accumulators(Protocol):
    """Where layers add weight gradients up themselves, in fp32 or wider, instead of handing them to autograd.

    A GEMM can add to what is there as it writes; through autograd the product is written in the dtype of
    the weight, read, and added in a second pass over memory that also rounds it.
    """

    def expect(self, weight: nn.Parameter) -> None:
        """One more place uses `weight`: each backward of it calls `add` once."""

    def add(self, weight: nn.Parameter, write: Callable[[Tensor, bool], object]) -> None:
        """Call `write(total, first_microbatch)`: it adds a gradient to `total`, or sets it in the first microbatch."""

    def defer(self, weight: nn.Parameter, write: Callable[[Tensor, bool], object]) -> None:
        """The same, deferred until a message is under way, at the latest until the end of the step's backwards."""

    def flush(self) -> None:
        """A message is under way: do what was deferred, so that it passes behind that."""

    def add_in_forward(self, weight: nn.Parameter, write: Callable[[Tensor, bool], object]) -> None:
        """The same in a forward. The backward of that use calls `complete`."""

    def complete(self, weight: nn.Parameter) -> None:
        """The backward of a use whose gradient was added `add_in_forward`."""


Factor = tuple[Tensor, ...]
"""A factor of a GEMM, in whatever form its arithmetic wants it."""


class WeightInFp8(Protocol):
    """W in fp8 for the forward, [d_out, d_in], and W^T for the backward, [d_in, d_out], each with its scales."""

    @property
    def plain(self) -> Tensor: ...
    @property
    def plain_scale(self) -> Tensor: ...
    @property
    def across(self) -> Tensor: ...
    @property
    def across_scale(self) -> Tensor: ...


class Gemms(Protocol):
    """The three products of a weight W [d_out, d_in] with x [.., d_in] and with dy [.., d_out].

    `column` says that tp cuts the rows of W, so that each of its ranks has all of x and a part of dy; else it is the
    other way round.
    """

    def expect(self, weight: nn.Parameter) -> None:
        """A place of the model multiplies by `weight`, and reads it in no other way."""

    def forward(
        self, x: Tensor, weight: nn.Parameter, bias: Tensor | None, *, column: bool, keep: bool
    ) -> tuple[Tensor, Factor]:
        """y = x W^T + b, and x as `add` wants it; unless it is to be kept, only what `recompute` needs besides x."""

    def recompute(self, x: Tensor, kept: Factor) -> Factor:
        """x as `add` wants it, from the same x once more."""

    def backward(self, dy: Tensor, weight: nn.Parameter, *, column: bool) -> tuple[Tensor, Factor]:
        """dx = dy W, and dy as `add` wants it."""

    def add(self, total: Tensor, first_microbatch: bool, dy: Factor, x: Factor) -> None:
        """total [d_out, d_in] += dy^T x, or = where `first_microbatch`."""

    def bias(self, dy: Tensor) -> Tensor:
        """db [d_out], the sum of dy [.., d_out] over all tokens."""


def unfused(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it is, one kernel for each operation in it."""
    return function


@dataclass(frozen=True)
class Build:
    """Where a layer lies, how it is stored, and how it computes.

    Under `sequence_parallel` what lies outside the column -> row pairs works on this rank's part of the sequence.
    `seed` is that of the dropout masks. `fuse` makes one kernel of a function of several elementwise operations
    (`torch.compile`, or nothing). With `recompute` the cheap operations in front of a GEMM are not kept for the
    backward but done once more in it. Weight gradients go to `accumulators`, or where there are none to autograd.
    `gemms` compute the products of the blocks' matrices, where it is not in `dtype`. Without `allocate` parameters
    have no memory, and no values, until they are moved into buckets: a whole model need never exist. With `lora` linear
    layers that it names have adapters. Feed-forward takes the sequence in so many `chunks`, each computed once more in
    the backward.
    With `exact` slices all that tp may cut is computed slice by slice, to the same bits for every tp.
    A microbatch goes through each place in so many `uses`.
    `cp` are the ranks that have the rest of a row, for what must see it whole beside attention.
    `experts` says where those are, `experts_fp8` computes their products (`stretto.experts.fp8`), and a global batch
    has so many `tokens`: what the losses of experts are means over.
    """

    tp: Axis
    sequence_parallel: bool
    dtype: torch.dtype
    device: torch.device | str = "cpu"
    seed: int = 0
    fuse: Callable[[Callable[..., Any]], Callable[..., Any]] = unfused
    recompute: bool = False
    accumulators: Accumulators | None = None
    gemms: Gemms | None = None
    allocate: bool = True
    lora: Lora | None = None
    chunks: int = 1
    cp: Axis = field(default_factory=lambda: Axis.single("cp"))
    experts: ExpertAxes = field(default_factory=ExpertAxes.single)
    experts_fp8: Any = None
    tokens: int = 1
    exact: Slices | None = None
    uses: int = 1

    @property
    def alone(self) -> Build:
        """The same without the borders of the tensor-parallel region."""
        return replace(self, tp=Axis.single("tp"), sequence_parallel=False)

    @cached_property
    def overlap_with(self) -> OverlapWith:
        """What is done while a message of tensor parallelism is under way: weight gradients that were deferred."""
        return nothing if self.accumulators is None or self.tp.size == 1 else self.accumulators.flush
