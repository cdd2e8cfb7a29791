"""The values of parameters: the first ones, and the slices of logical tensors that a rank holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from stretto.params.spec import Declared, Init, Part, Slice
from stretto.random import normal_


def fill(declared: Sequence[Declared], seed: int, into: Callable[[nn.Parameter], Tensor | Part]) -> None:
    """Write the initial values of every parameter to `into(parameter)`, or to a part of it; padding becomes zero.

    The values depend on the seed, the logical name and the element's place in the logical tensor, not on the layout.
    What a parameter holds that is declared to keep its values stays.
    """
    with torch.no_grad():
        for item in declared:
            stored = into(item.param)
            if item.init_kept:
                if isinstance(stored, Tensor):  # a part of it was made from it
                    stored.copy_(item.param)
                continue
            stored = stored.zero_()
            for logical in item.logical:
                spec, init = logical.spec, logical.spec.init or Init()
                for offsets, view in logical.pieces(stored):
                    if init.std:
                        normal_(
                            view, seed=seed, name=logical.name, full_shape=spec.shape, offsets=offsets, std=init.std
                        )
                    view.add_(init.mean)


def slices(
    declared: Sequence[Declared],
    stored: Callable[[nn.Parameter], Tensor | Part],
    position: Mapping[str, int],
    prefix: str = "",
) -> list[Slice]:
    """This rank's slices of every logical tensor, taken from `stored(parameter)`, the whole of it or a part.

    `position` has the rank's coordinates as `ParamSpec.owner` wants them.
    """
    return [
        Slice(prefix + logical.name, view, logical.spec.shape, offsets, logical.spec.owner(position))
        for item in declared
        for logical in item.logical
        for offsets, view in logical.pieces(stored(item.param))
    ]
