"""What of the model is trained: all of it, all but frozen parameters, or adapters alone."""

from __future__ import annotations

from collections.abc import Container
from fnmatch import fnmatchcase
from typing import Final

import torch
from torch import nn

from stretto.arguments import Arguments, ConfigError, Violation
from stretto.arguments.sections import TuningConfig
from stretto.models import StageSpec, Transformer
from stretto.params import collect
from stretto.tensor_parallel import Build
from stretto.world import Axis

_SHOWN: Final = 8


def require_trained(args: Arguments) -> None:
    """Raise ConfigError where a pattern freezes nothing, or a part of what is stored as one, or nothing is left."""
    if not args.tuning.freeze:
        return
    declared = collect(_whole(args))
    names = [part.name for item in declared for part in item.logical]
    wrong = [
        f"{p!r} is the name of no parameter"
        for p in args.tuning.freeze
        if not any(fnmatchcase(name, p) for name in names)
    ]
    for item in declared:
        chosen = [part.name for part in item.logical if not args.tuning.trains(part.name)]
        if chosen and len(chosen) < len(item.logical):
            others = ", ".join(part.name for part in item.logical if part.name not in chosen)
            wrong.append(
                f"{', '.join(chosen)} cannot be frozen without {others}: they are stored and multiplied as one"
            )
    if not wrong and not any(args.tuning.trains(name) for name in names):
        wrong.append("it leaves nothing to train")
    if wrong:
        hint = f"names are such as {', '.join(names[: _SHOWN // 2])}"
        problem = f"freeze = {','.join(args.tuning.freeze)}: {'; '.join(wrong[:_SHOWN])}"
        raise ConfigError([Violation("freeze_names_parameters", ("tuning.freeze",), problem, hint=hint)])


def freeze(module: nn.Module, tuning: TuningConfig, elsewhere: Container[nn.Parameter] = ()) -> None:
    """Take gradients from the parameters of a stage that are not trained; those `elsewhere` are another stage's."""
    for item in collect(module, elsewhere=elsewhere):
        item.param.requires_grad_(tuning.trains(item.logical[0].name))


def _whole(args: Arguments) -> Transformer:
    """The whole model, without memory."""
    alone = Build(Axis.single("tp"), False, torch.float32, "meta")
    return Transformer(args.model, StageSpec.whole(args.model), alone, seq_len=args.batch.seq_len)
