"""Where each parameter and each activation of a run comes from: the module that makes it, and its declaration."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from stretto.arguments.schema import Arguments
from stretto.models import StageSpec, Transformer
from stretto.params import ParamSpec, collect
from stretto.tensor_parallel import Build
from stretto.train.dtypes import DTYPES
from stretto.verify.activations import pieces_of
from stretto.world import Axis


@dataclass(frozen=True)
class Place:
    """A module by path and class; for a parameter also its spec."""

    module: str
    kind: type[nn.Module]
    spec: ParamSpec | None = None

    @property
    def source(self) -> str:
        """The class and where it begins, as `RowParallelLinear (stretto/tensor_parallel/layers.py:62)`."""
        return f"{self.kind.__qualname__} ({line_of(self.kind)})"


def line_of(thing: Any) -> str:
    """File and line of a class or function of this package; of others the module."""
    thing = inspect.unwrap(thing)
    root = Path(__file__).parents[2]
    file = Path(inspect.getsourcefile(thing) or "")
    if thing.__module__.partition(".")[0] != __name__.partition(".")[0]:
        return str(thing.__module__)
    return f"{file.relative_to(root)}:{inspect.getsourcelines(thing)[1]}"


def places(args: Arguments) -> dict[str, Place]:
    """The place of every parameter (`NAME.weight`) and activation (`NAME`) of a layout; nothing is allocated."""
    parallel = args.parallel
    tp = Axis("tp", 0, tuple(range(parallel.tp)))
    build = Build(tp, parallel.sequence_parallel, DTYPES[args.run.dtype], "meta")
    model = Transformer(args.model, StageSpec.whole(args.model), build, seq_len=args.batch.seq_len)
    kinds = {path: type(module) for path, module in model.named_modules()}
    paths = {module: path for path, module in model.named_modules()}
    found = {p.name: Place(paths[module], type(module)) for module, pieces in pieces_of(model) for p in pieces}
    for item in collect(model):
        path = item.name.rpartition(".")[0]
        found |= {part.name: Place(path, kinds[path], part.spec) for part in item.logical}
    return found
