"""A user's own module as the stages of a pipeline."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, get_args

import torch
from torch import Tensor, nn

from stretto.distributed import DataParallel
from stretto.distributed.dropout import Dropout, number_rows, warn_of_dropout
from stretto.distributed.replicate import FROZEN, replicate
from stretto.exchange import all_gather_json
from stretto.pipeline_parallel import TensorMeta
from stretto.schedule import Sharding
from stretto.schedule.sharding import MODES
from stretto.tensor_parallel import Build
from stretto.train.assemble import StageSpec
from stretto.train.batches import Share
from stretto.train.step import OnNonfinite
from stretto.world import Axis

Loss = Callable[[Tensor, Any], Tensor]

WAVELENGTHS: Final = ("inv_freq", "original_inv_freq")
"""Buffers of rotary embeddings, by the names that `transformers` gives them."""


class StageCall:
    """What the executor calls in place of a stage's module: inputs in on the first stage, a loss out on the last."""

    def __init__(self, stages: int, loss: Loss | None, index: int, module: nn.Module) -> None:
        self.module, self.loss, self.last = module, loss, index == stages - 1
        if loss is None:
            require_share(module)
        self.draws = any(isinstance(part, Dropout) for part in module.modules())

    def __call__(self, x: Tensor | None, share: Share) -> Tensor:
        if not torch.is_grad_enabled():
            with _evaluating(self.module):
                return self._call(x, share)
        if share.numbers is None or not self.draws:
            return self._call(x, share)
        number_rows(self.module, share.numbers)
        y = self._call(x, share)
        if y.requires_grad:  # what the backward recomputes drops what this forward dropped
            y.register_hook(lambda _: number_rows(self.module, share.numbers))  # type: ignore[no-untyped-call]
        return y

    def _call(self, x: Tensor | None, share: Share) -> Tensor:
        if self.loss is None:
            whole: Tensor = self.module(x, share)
            return whole
        pair = isinstance(share.rows, tuple | list) and len(share.rows) == 2
        inputs, targets = share.rows if pair else (share.rows, share.rows)
        y: Tensor = self.module(inputs if x is None else x)
        if not self.last:
            return y
        loss: object = self.loss(y, targets)
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"the loss is a {type(loss).__name__}: it must be one tensor [], the sum of its parts where it has "
                "some, and no number such as its .item()"
            )
        return loss * share.share


def require_share(module: nn.Module) -> None:
    """Raise TypeError for a module that is to be called with a `Share`, as nobody gave a loss, and takes none."""
    try:
        signature = inspect.signature(module.forward)
    except ValueError:  # not known
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise TypeError(
            f"without Trainer(loss=...) each stage is called as module(x, share) and the last returns the loss, but "
            f"{type(module).__name__}.forward{signature} cannot be: give Trainer a loss(output, targets)"
        ) from error


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Nothing of it is in training mode: nothing drops."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    yield
    for part in training:
        part.training = True


def stage_of(
    model: nn.Module | Callable[[StageSpec], nn.Module], stages: int, build: Build, say: bool, index: int
) -> nn.Module:
    """The module of a stage, on its device, all of its parameters declared; with `say`, a line about its dropout."""
    module = model if isinstance(model, nn.Module) else model(StageSpec(index, stages, build))
    if say:
        warn_of_dropout(module)
        _warn_of_rounding(module, build.dtype)
    module = _placed(module, build)
    return replicate(module) if build.tp.size == 1 else module


def _warn_of_rounding(module: nn.Module, dtype: torch.dtype) -> None:
    """Say that fp64 is lost, which nobody may have asked for: fp32 is what a `Trainer` takes by itself."""
    if dtype == torch.float32 and any(p.dtype == torch.float64 for p in module.parameters()):
        logging.getLogger(__name__).warning(
            "parameters in float64 are rounded to float32: say Trainer(dtype=torch.float64) to train them as they are"
        )


def _placed(module: nn.Module, build: Build) -> nn.Module:
    """The module on its device in its dtype, but for wavelengths of rotary embeddings.

    `transformers` computes angles from these in fp32, whatever the model's dtype: rounded to bf16, which has 8 bits,
    they would be another model, by whole turns at long distances.
    """
    exact = [
        (part, name, buffer)
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
        if name in WAVELENGTHS
    ]
    module = module.to(device=build.device, dtype=build.dtype)
    for part, name, buffer in exact:
        part._buffers[name] = buffer.to(build.device)
    return module


def require_meant(lr: object, optimizer: object, sharding: Sharding | str, on_nonfinite: str) -> None:
    """Raise TypeError or ValueError for what a `Trainer` cannot have been given on purpose."""
    if not callable(lr) and (isinstance(lr, bool) or not isinstance(lr, int | float)):
        raise TypeError(f"lr={lr!r}: give a number, or a function from the number of an update to one")
    if not callable(lr) and not lr >= 0:
        raise ValueError(f"lr={lr!r}: a learning rate is 0 or more")
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    if issubclass(kind, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer is torch.optim's {kind.__name__}: give one of Stretto's, such as stretto.AdamW(), which "
            "updates weights that lie in flat buckets, and parts of them on each rank"
        )
    if isinstance(sharding, str) and sharding not in MODES:
        raise ValueError(f"sharding={sharding!r}: take one of {', '.join(MODES)}")
    if on_nonfinite not in (known := get_args(OnNonfinite)):
        raise ValueError(f"on_nonfinite={on_nonfinite!r}: take one of {', '.join(known)}")


def require_trainable(weights: DataParallel, axis: Axis) -> None:
    """Raise ValueError where nothing of a model is trained, or where two of its parameters have one name."""
    require_trained(weights, axis)
    require_names_apart(weights, axis)


def require_trained(weights: DataParallel, pp: Axis) -> None:
    """Raise ValueError, on all ranks of the pipeline, where no stage has a parameter that wants a gradient."""
    if not any(all_gather_json(any(item.param.requires_grad for item in weights.declared), pp)):
        raise ValueError(FROZEN)


def require_names_apart(weights: DataParallel, pp: Axis) -> None:
    """Raise ValueError, on all ranks of the pipeline, where stages have other parameters under one name: a checkpoint
    could not hold both. A tied one is one parameter."""
    own = [part.name for item in weights.declared for part in item.logical if "embed" not in part.spec.sum_grad]
    times = Counter(name for names in all_gather_json(own, pp) for name in names)
    if twice := [name for name, n in times.items() if n > 1]:
        raise ValueError(
            f"several stages have a parameter {', '.join(twice[:4])}: name layers by their numbers in the whole model, "
            'as in nn.Sequential(OrderedDict((f"layer{n}", ...) for n in spec.layers(number)))'
        )


def boundary_of(model: object, shape: tuple[int, ...] | None, dtype: torch.dtype, stages: int) -> TensorMeta | None:
    """What stages pass on for a microbatch. Raises ValueError where a layout has several, and it is not said."""
    if stages > 1 and isinstance(model, nn.Module):
        raise ValueError(
            f"a module is one stage, but the layout has pp={stages}: give Trainer a function from a StageSpec to "
            "the module of that stage, or a layout with pp=1"
        )
    if stages > 1 and shape is None:
        raise ValueError(
            f"the layout has pp={stages} stages: say what they pass on for one microbatch, "
            "Trainer(..., boundary=(micro_batch, width))"
        )
    return None if shape is None else TensorMeta(shape, dtype)
