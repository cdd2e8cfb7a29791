"""Gradients of which several ranks hold a part: summed once, when the step's backwards are done.

Norms under sequence parallelism (each rank saw a part of the sequence), key and value heads shared by several
ranks (each saw some of the queries), tied embeddings (each end stage used its copy): `ParamSpec.sum_grad` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from stretto.collectives import all_reduce_
from stretto.parallel_state import ParallelState
from stretto.params import Declared, Logical


def sum_partial_gradients(
    declared: Sequence[Declared], grad: Callable[[nn.Parameter], Tensor], state: ParallelState
) -> None:
    """Sum over the axes of `sum_grad`, in place: one all-reduce for each axis, all its tensors packed together."""
    for name in sorted({a for d in declared for part in d.logical for a in part.spec.sum_grad}):
        axis = state.axis(name)
        if axis.size == 1:
            continue
        parts = [(part, part.view(grad(d.param))) for d in declared for part in d.logical if name in part.spec.sum_grad]
        # The two ends of a pipeline find a tied tensor at different places among others: a common order is by name.
        parts.sort(key=lambda p: p[0].name)
        packed = torch.cat([_spread(part, view, name).flatten() for part, view in parts])
        all_reduce_(packed, axis).wait()
        sizes = [_spread_shape(part, name).numel() for part, _ in parts]
        for (part, view), flat in zip(parts, torch.split(packed, sizes), strict=True):
            view.copy_(_mine(part, flat.view(_spread_shape(part, name)), name))


def _spread(part: Logical, view: Tensor, axis: str) -> Tensor:
    """The block in the place it has along `axis`, zeros around it; the block itself where it is not cut there.

    Ranks that hold the same chunk then add theirs up, and the others add zeros.
    """
    wide = view.new_zeros(_spread_shape(part, axis))
    _mine(part, wide, axis).copy_(view)
    return wide


def _spread_shape(part: Logical, axis: str) -> torch.Size:
    cut = {s.dim for s in part.spec.shard if s.axis == axis}
    return torch.Size(
        full if dim in cut else own
        for dim, (full, own) in enumerate(zip(part.spec.shape, part.block.shape, strict=True))
    )


def _mine(part: Logical, wide: Tensor, axis: str) -> Tensor:
    for cut in part.spec.shard:
        if cut.axis == axis:
            wide = wide.narrow(cut.dim, part.block.offsets[cut.dim], part.block.shape[cut.dim])
    return wide
