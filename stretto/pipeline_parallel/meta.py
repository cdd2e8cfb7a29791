"""Shape and dtype of a tensor that is not here yet, and their form as a message."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

import torch
from torch import Tensor

from stretto.world import AsyncTensor

DTYPES: Final = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
MAX_DIM: Final = 8


@dataclass(frozen=True)
class TensorMeta:
    """What the receiver of a tensor must know beforehand. Without `gradient` none comes back for it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    gradient: bool = field(default=True, compare=False)

    @property
    def differentiable(self) -> bool:
        """Whether a gradient of it goes back: never of integers."""
        return self.gradient and self.dtype.is_floating_point

    @classmethod
    def of(cls, x: Tensor) -> Self:
        """The shape and dtype of `x`."""
        return cls(tuple(x.shape), x.dtype)

    def __str__(self) -> str:
        return f"{list(self.shape)} of {str(self.dtype).removeprefix('torch.')}"

    def encode(self) -> list[int]:
        """As `MAX_DIM + 1` integers: the number of the dtype, the sizes, and -1 for dimensions that it has not."""
        return [DTYPES.index(self.dtype), *self.shape, *([-1] * (MAX_DIM - len(self.shape)))]

    @classmethod
    def decode(cls, numbers: Sequence[int]) -> Self:
        """What `encode` made these integers of."""
        dtype, *sizes = numbers
        return cls(tuple(size for size in sizes if size >= 0), DTYPES[dtype])


Boundary = TensorMeta | tuple[TensorMeta, ...]
"""What enters a stage: a tensor, or a tuple of them."""
Passed = Tensor | tuple[Tensor, ...]
EachBoundary = Boundary | Callable[[Any], Boundary]
"""One for all microbatches, or a function of the microbatch, where their lengths differ."""


def boundary_of(said: EachBoundary | None, microbatch: Any) -> Boundary | None:
    """What enters for this microbatch."""
    return said if said is None or isinstance(said, TensorMeta | tuple) else said(microbatch)


def metas(boundary: Boundary) -> tuple[TensorMeta, ...]:
    """Of each tensor."""
    return (boundary,) if isinstance(boundary, TensorMeta) else boundary


def tensors(passed: Passed) -> tuple[Tensor, ...]:
    """Each of them."""
    return (passed,) if isinstance(passed, Tensor) else passed


def found(passed: Passed) -> Boundary:
    """The boundary over which this passes."""
    return TensorMeta.of(passed) if isinstance(passed, Tensor) else tuple(map(TensorMeta.of, passed))


def text(boundary: Boundary) -> str:
    """In words."""
    return str(boundary) if isinstance(boundary, TensorMeta) else f"({', '.join(map(str, boundary))})"


@dataclass(frozen=True)
class Parcel:
    """What passes between two stages: here, or on its way."""

    parts: tuple[AsyncTensor, ...]
    single: bool

    @classmethod
    def of(cls, passed: Passed) -> Self:
        """Of what is here."""
        return cls(tuple(map(AsyncTensor, tensors(passed))), isinstance(passed, Tensor))

    def wait(self) -> Passed:
        """All of it, in the form in which the stage before put it out."""
        parts = tuple(part.wait() for part in self.parts)
        return parts[0] if self.single else parts
