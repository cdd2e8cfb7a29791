"""Whole tensors from slices, and back: what a comparison of layouts looks at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from stretto.exchange import all_gather_tensors
from stretto.params import Slice
from stretto.world import Axis

CPU: Final = torch.device("cpu")


def gather_full(pieces: Sequence[Slice], world: Axis, home: torch.device = CPU) -> dict[str, Tensor]:
    """Every logical tensor whole, on the device `home` of every rank, put together from what the owners hold.

    Raises ValueError when the owners' slices do not tile a tensor: then some parameter's place is declared wrong.
    """
    own = {json.dumps([p.name, p.full_shape, p.offsets]): p.tensor.detach() for p in pieces if p.owner}
    full: dict[str, Tensor] = {}
    written: dict[str, int] = {}
    ranks = all_gather_tensors(own, world) if world.size > 1 else [own]
    for where, block in (found for rank in ranks for found in rank.items()):
        name, full_shape, offsets = json.loads(where)
        if name not in full:
            empty = torch.nan if block.is_floating_point() else -1
            full[name] = torch.full(full_shape, empty, dtype=block.dtype, device=home)
        full[name][_place(offsets, block)] = block
        written[name] = written.get(name, 0) + block.numel()
    wrong = [f"{n}: {written[n]} of {t.numel()} elements" for n, t in full.items() if written[n] != t.numel()]
    if wrong:
        raise ValueError("the owners' slices do not tile " + "; ".join(wrong))
    return dict(sorted(full.items()))


def load_full(pieces: Sequence[Slice], full: Mapping[str, Tensor]) -> None:
    """Write each slice's part of the whole tensors into it.

    Raises KeyError naming tensors that are not there.
    """
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
    return [p.name for p in pieces if not torch.equal(p.tensor.detach().to(full[p.name].device), cut(full[p.name], p))]


def _place(offsets: Sequence[int], block: Tensor) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(offsets, block.shape, strict=True))
