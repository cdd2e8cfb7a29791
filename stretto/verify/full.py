"""Whole tensors from slices, and back: what a comparison of layouts looks at."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from stretto.params import Slice
from stretto.world import Axis


def gather_full(pieces: Sequence[Slice], world: Axis) -> dict[str, Tensor]:
    """Every logical tensor whole, on the CPU of every rank, put together from what the owners hold.

    Raises ValueError when the owners' slices do not tile a tensor: then some parameter's place is declared wrong.
    """
    everyone = [_Packed.of([p for p in pieces if p.owner])]
    if world.size > 1:
        everyone *= world.size
        dist.all_gather_object(everyone, everyone[0], group=world.group)
    full: dict[str, Tensor] = {}
    written: dict[str, int] = {}
    for piece, block in (found for packed in everyone for found in packed.blocks()):
        if piece.name not in full:
            full[piece.name] = torch.full(piece.full_shape, torch.nan, dtype=block.dtype)
        full[piece.name][_place(piece.offsets, block)] = block
        written[piece.name] = written.get(piece.name, 0) + block.numel()
    wrong = [f"{n}: {written[n]} of {t.numel()} elements" for n, t in full.items() if written[n] != t.numel()]
    if wrong:
        raise ValueError("the owners' slices do not tile " + "; ".join(wrong))
    return dict(sorted(full.items()))


def load_full(pieces: Sequence[Slice], full: Mapping[str, Tensor]) -> None:
    """Write each slice's part of the whole tensors into it. Raises KeyError naming tensors that are not there."""
    missing = sorted({p.name for p in pieces} - set(full))
    if missing:
        raise KeyError(f"no whole tensor for {', '.join(missing)}")
    with torch.no_grad():
        for p in pieces:
            p.tensor.copy_(cut(full[p.name], p))


def cut(full: Tensor, piece: Slice) -> Tensor:
    """The part of a whole tensor that a slice holds."""
    if tuple(full.shape) != piece.full_shape:
        raise ValueError(f"{piece.name}: whole tensor of shape {list(full.shape)}, expected {list(piece.full_shape)}")
    return full[_place(piece.offsets, piece.tensor)]


def unequal_replicas(pieces: Sequence[Slice], full: Mapping[str, Tensor]) -> list[str]:
    """Names of the slices on this rank that are not, bit for bit, what their owner holds."""
    return [p.name for p in pieces if not torch.equal(p.tensor.detach().cpu(), cut(full[p.name], p))]


@dataclass(frozen=True)
class _Packed:
    """Slices on their way to other ranks: where each lies, and all their bytes end to end.

    Pickling tensors one by one took most of the time of a comparison of small models.
    """

    pieces: tuple[_Header, ...]
    data: NDArray[np.uint8]

    @classmethod
    def of(cls, pieces: Sequence[Slice]) -> _Packed:
        own = [p.tensor.detach().cpu() for p in pieces]
        headers = (
            _Header(p.name, p.full_shape, p.offsets, tuple(t.shape), t.dtype) for p, t in zip(pieces, own, strict=True)
        )
        flat = [torch.empty(0, dtype=torch.uint8), *(t.reshape(-1).view(torch.uint8) for t in own)]
        return cls(tuple(headers), torch.cat(flat).numpy())

    def blocks(self) -> Iterator[tuple[_Header, Tensor]]:
        start, data = 0, torch.from_numpy(self.data)
        for piece in self.pieces:
            end = start + math.prod(piece.shape) * piece.dtype.itemsize
            yield piece, data[start:end].clone().view(piece.dtype).view(piece.shape)
            start = end


@dataclass(frozen=True)
class _Header:
    name: str
    full_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


def _place(offsets: Sequence[int], block: Tensor) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(offsets, block.shape, strict=True))
