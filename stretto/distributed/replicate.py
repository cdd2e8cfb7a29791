"""Modules that know nothing of ranks: every parameter whole on each of them, and the same on all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from typing import Final, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stretto.collectives import broadcast
from stretto.parallel_state import ParallelState
from stretto.params import Declared, ParamSpec, collect, declare, declared_in
from stretto.world import Axis

M = TypeVar("M", bound=nn.Module)

FROZEN: Final = (
    "no parameter of the model has requires_grad=True, so there is nothing to train: set it on those that are to move "
    "before the model is handed over"
)


def replicate(module: M, state: ParallelState | None = None) -> M:
    """Declare every parameter of `module` that has no declaration yet as whole on every rank; returns the module.

    Its values stay as they are, and are not drawn from a seed. With `state` all ranks that hold the module take those
    of the first. Matrices decay, vectors do not. Raises ValueError for batch norm: its statistics are those of a
    microbatch, so the model would depend on the layout.
    """
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm):
            raise ValueError(
                f"{name or 'the module'} is a {type(part).__name__}, which normalizes over the rows of one microbatch: "
                "the layout would change the model; use LayerNorm or GroupNorm"
            )
    declare_rest(module)
    if state is not None:
        align(module, state)
    return module


def declare_rest(module: nn.Module, apart: tuple[str, ...] = ("pp",)) -> int:
    """Declare what is not declared yet as whole on every rank, with the values that it has; how many there were.
    Ranks of the axes `apart` hold other parameters.

    Raises ValueError for a module that sums gradients over ranks by itself.
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"{name or 'the module'} is a DistributedDataParallel, which sums gradients by itself: hand over its "
                ".module"
            )
    unknown = set(undeclared(module).values())
    number = len(unknown)
    for part in module.modules():
        for name, param in part.named_parameters(recurse=False):
            if param in unknown:  # nor shared with a module before
                alone = isinstance(part, nn.Embedding | nn.EmbeddingBag)
                shape = tuple(param.shape)
                spec = ParamSpec(shape, None, weight_decay=param.dim() > 1, elementwise=alone, apart=apart)
                declare(part, name, spec)
                unknown.discard(param)
    return number


def undeclared(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of which no module has said how they lie on the ranks, by name."""
    known = {getattr(part, name) for part in module.modules() for name in declared_in(part)}
    return {name: param for name, param in module.named_parameters() if param not in known}


def require_no_newcomers(stages: Mapping[int, nn.Module], known: Container[nn.Parameter]) -> None:
    """After a backward. Raises RuntimeError for what got a gradient and is not `known`: nothing would update it."""
    found = [(name, param) for module in stages.values() for name, param in module.named_parameters()]
    if new := [name for name, param in found if param.grad is not None and param not in known]:
        raise RuntimeError(
            f"{', '.join(new)} came into the module after it was handed over, so nothing updates it: make all "
            "parameters before, and hand the module over again when it has changed"
        )


@torch.no_grad()
def align(module: nn.Module, state: ParallelState, elsewhere: Container[nn.Parameter] = ()) -> None:
    """Give all ranks that hold the same block of a parameter whose values are kept those of the first of them."""
    for item in collect(module, elsewhere=elsewhere):
        if item.init_kept:
            cut = {shard.axis for part in item.logical for shard in part.spec.shard}
            for axis in (state.axis(*item.replicas), *(() if "tp" in cut else (state.axis("tp"),))):
                take_first(item.param.data, axis)


@torch.no_grad()
def take_first(x: Tensor, axis: Axis) -> None:
    """Give `x` on all ranks of the axis the value that it has on the first of them, in any dtype."""
    if axis.size == 1 or not x.numel():
        return
    own = x.detach().reshape(-1).view(torch.uint8)  # back ends do not take every dtype
    first = broadcast(own, axis)
    if not torch.equal(own, first):
        x.copy_(first.view(x.dtype).view(x.shape))


def require_single(declared: Iterable[Declared]) -> None:
    """Raise ValueError for two copies of one logical tensor on this rank."""
    holders = Counter(part.name for d in declared for part in d.logical)
    if twice := [name for name, count in holders.items() if count > 1]:
        raise ValueError(
            f"{', '.join(twice)} lies on this rank twice, in stages of their own: nothing adds the gradients of "
            "its copies; place the stages that share it on different ranks, or name what is not shared otherwise"
        )
