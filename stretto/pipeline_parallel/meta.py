"""Shape and dtype of a tensor that is not here yet, and their form as a message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

import torch
from torch import Tensor

DTYPES: Final = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MAX_DIM: Final = 8


@dataclass(frozen=True)
class TensorMeta:
    """What the receiver of a tensor must know beforehand."""

    shape: tuple[int, ...]
    dtype: torch.dtype

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
