"""Which tensors differ between two checkpoints, whatever layouts wrote them; one tensor is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from stretto.checkpoint.index import Index
from stretto.checkpoint.index import Tensor as Described
from stretto.checkpoint.reader import read_pieces
from stretto.params import Slice


@dataclass(frozen=True)
class Difference:
    """A tensor that two checkpoints do not hold alike."""

    name: str
    what: str
    largest: float | None = None
    """Absolute difference, where both hold it in the same shape and dtype."""
    elements: int = 0
    """That differ."""


def differences(a: Path, b: Path) -> Iterator[Difference]:
    """By name. Raises CheckpointError where one of them cannot be read."""
    first, second = Index(a), Index(b)
    for name in sorted({*first.tensors, *second.tensors}):
        one, other = first.tensors.get(name), second.tensors.get(name)
        if one is None or other is None:
            yield Difference(name, f"{one or other} in {(b if one is None else a).name} alone")
        elif str(one) != str(other):
            yield Difference(name, f"{one} in {a.name}, {other} in {b.name}")
        else:
            x, y = _whole(first, one), _whole(second, other)
            if torch.equal(_bits(x), _bits(y)):
                continue
            unlike = (x != y) & ~(x.isnan() & y.isnan()) if x.is_floating_point() else x != y
            far = (x.double() - y.double()).abs().max() if not x.is_complex() else (x - y).abs().max()
            yield Difference(name, str(one), float(far), int(unlike.sum()))


def _whole(index: Index, tensor: Described) -> torch.Tensor:
    x = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype))
    held = Slice(tensor.name, x, tensor.shape, (0,) * x.dim(), owner=False)
    described = index.tensor(tensor.name)
    read_pieces(index.path, [(described, piece, held) for piece in described.pieces])
    return x


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1).view(torch.uint8)
