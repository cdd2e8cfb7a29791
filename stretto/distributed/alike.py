"""A module that each rank made by itself, before it is handed over: the copies must be one model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Final

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stretto.distributed.replicate import take_first
from stretto.exchange import all_gather_json
from stretto.parallel_state import ParallelState
from stretto.params import checksum, collect, read_together
from stretto.world import Axis

MOST: Final = 3
"""Names that a message has."""


def apart_along(module: nn.Module, pipeline: Axis) -> tuple[str, ...]:
    """The axes whose ranks hold other parameters: that of the pipeline, unless all of its ranks hold the same names and
    shapes."""
    if pipeline.size == 1:
        return ("pp",)
    held = {name: list(param.shape) for name, param in module.named_parameters()}
    return () if all(each == held for each in all_gather_json(held, pipeline)) else ("pp",)


def align_copies(module: nn.Module, state: ParallelState) -> None:
    """Give parameters and buffers the values of the first data-parallel rank, as `DistributedDataParallel` does."""
    for item in collect(module):
        take_first(item.param.data, state.axis(*item.replicas))
    for buffer in module.buffers():
        take_first(buffer, state.axis("dp", "cp"))


def require_alike(undeclared: Mapping[str, Tensor], axes: Iterable[Axis]) -> None:
    """Raise ValueError on all ranks of an axis where these parameters, which count as one on all, have other values."""
    for axis in axes:
        if axis.size > 1:
            held = dict(zip(undeclared, read_together([checksum(x) for x in undeclared.values()]), strict=True))
            told = all_gather_json(held, axis)
            if other := sorted({n for each in told for n in held.keys() | each if each.get(n) != told[0].get(n)}):
                raise ValueError(
                    f"{', '.join(other[:MOST])}{' and more' if len(other) > MOST else ''} differ over the ranks of "
                    f"{axis}, but count as whole and the same there, as nobody declared them: make the module from the "
                    "same seed on all of them; stretto.declare(module, name, ParamSpec(...)) says where each rank has "
                    "a part, and stages of a pipeline name their parameters by their places in the whole model"
                )


def warn_of_batch_norm(module: nn.Module) -> None:
    """One line where the statistics are those of the rows of one rank's microbatch."""
    named = [(name or type(part).__name__, part) for name, part in module.named_modules()]
    alone = [part for part in named if isinstance(part[1], _BatchNorm) and not isinstance(part[1], nn.SyncBatchNorm)]
    if found := [name for name, _ in alone]:
        logging.getLogger(__name__).warning(
            "%s%s normalizes over the rows of one rank's microbatch, so the layout changes the model, and each rank "
            "keeps statistics of its own: use LayerNorm or GroupNorm",
            ", ".join(found[:MOST]),
            " and more" if len(found) > MOST else "",
        )
