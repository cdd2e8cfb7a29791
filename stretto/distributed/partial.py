"""Gradients of which several ranks hold a part: summed once, when the step's backwards are done.

Norms under sequence parallelism (each rank saw a part of the sequence), key and value heads shared by several
ranks (each saw some of the queries), tied embeddings (each end stage used its copy): `ParamSpec.sum_grad` says so.
The ranks that hold parts of a tensor cut it into the same shards, so each sums its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stretto.collectives import all_reduce_
from stretto.parallel_state import ParallelState
from stretto.params import Logical


class Gradient(NamedTuple):
    """What this rank has of the gradient of a logical tensor: rectangles, at offsets in the whole of it."""

    of: Logical
    pieces: list[tuple[tuple[int, ...], Tensor]]
    flat: Tensor
    """What they lie in."""


def sum_partial_gradients(gradients: Sequence[Gradient], state: ParallelState) -> None:
    """Sum over the axes of `sum_grad`, in place: one all-reduce for each axis, all its tensors packed together."""
    for name in sorted({a for each in gradients for a in each.of.spec.sum_grad}):
        axis = state.axis(name)
        if axis.size == 1:
            continue
        # The two ends of a pipeline find a tied tensor at different places among others: a common order is by name.
        parts = sorted((each for each in gradients if name in each.of.spec.sum_grad), key=lambda each: each.of.name)
        spread = [_spread(each, name) for each in parts]
        packed = torch.cat(spread)
        all_reduce_(packed, axis).wait()
        for each, flat in zip(parts, torch.split(packed, [len(x) for x in spread]), strict=True):
            for view, summed in _views(each, flat, name):
                view.copy_(summed)


def _spread(gradient: Gradient, axis: str) -> Tensor:
    """[n]: the pieces, one after another; where the tensor is cut along `axis`, at their places among zeros.

    Ranks that hold the same chunk then add theirs up, and the others add zeros.
    """
    shape = _wide(gradient.of, axis)
    size = sum(view.numel() for _, view in gradient.pieces) if shape is None else shape.numel()
    flat = gradient.flat.new_zeros(size)
    for view, place in _views(gradient, flat, axis):
        place.copy_(view)
    return flat


def _views(gradient: Gradient, flat: Tensor, axis: str) -> list[tuple[Tensor, Tensor]]:
    """Each piece, and its place in `flat`."""
    shape, found, end = _wide(gradient.of, axis), [], 0
    for offsets, view in gradient.pieces:
        if shape is None:
            place = flat[end : (end := end + view.numel())].view(view.shape)
        else:
            place = flat.view(shape)
            cut = {s.dim for s in gradient.of.spec.shard if s.axis == axis}
            for dim, (start, n) in enumerate(zip(offsets, view.shape, strict=True)):
                place = place.narrow(dim, start if dim in cut else start - gradient.of.block.offsets[dim], n)
        found.append((view, place))
    return found


def _wide(part: Logical, axis: str) -> torch.Size | None:
    """The shape of the block with the dims whole that are cut along `axis`; None where none is."""
    cut = {s.dim for s in part.spec.shard if s.axis == axis}
    whole = zip(part.spec.shape, part.block.shape, strict=True)
    return torch.Size(full if dim in cut else own for dim, (full, own) in enumerate(whole)) if cut else None
