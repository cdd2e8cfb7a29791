"""Declaring the parameters of a module, and collecting what was declared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Sequence

import torch
from torch import nn

from stretto.params.spec import Block, Declared, Logical, ParamSpec
from stretto.world import Axis

_DECLARED = "_stretto_declared"


def declare(
    module: nn.Module,
    name: str,
    specs: ParamSpec | Sequence[ParamSpec],
    *,
    axes: Sequence[Axis] = (),
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> nn.Parameter:
    """Declare the stored parameter `name` of `module`, creating it if the module does not have it yet.

    `axes` are those that the specs cut along. Raises ValueError when an existing parameter has another shape, or specs
    stored together disagree.
    """
    specs = (specs,) if isinstance(specs, ParamSpec) else tuple(specs)
    if len({(s.replicas, s.weight_decay, s.elementwise, s.init is None) for s in specs}) != 1:
        raise ValueError(
            f"{name}: logical tensors stored together must agree on replicas and weight decay, on keeping values and "
            "on being updated element by element"
        )
    blocks = [s.block({a.name: a for a in axes}) for s in specs]
    if len({b.stored[1:] for b in blocks}) != 1 or (len(blocks) > 1 and not all(b.stored for b in blocks)):
        raise ValueError(f"{name}: {[b.stored for b in blocks]} cannot be stacked along dimension 0")
    first = blocks[0].stored
    stored = (sum(b.stored[0] for b in blocks), *first[1:]) if first else ()
    if getattr(module, name, None) is None:
        if any(s.init is None for s in specs):
            raise ValueError(f"{name}: init=None keeps the values of a parameter, but the module has none of this name")
        setattr(module, name, nn.Parameter(torch.empty(stored, dtype=dtype, device=device)))
    param: nn.Parameter = getattr(module, name)
    if tuple(param.shape) != stored:
        raise ValueError(f"{name}: declared {stored} on this rank, but the parameter has {tuple(param.shape)}")
    module.__dict__.setdefault(_DECLARED, {})[name] = tuple(zip(specs, blocks, strict=True))
    return param


def collect(model: nn.Module, prefix: str = "", elsewhere: Container[nn.Parameter] = ()) -> tuple[Declared, ...]:
    """Every stored parameter of `model` with its logical tensors, in the order of the modules.

    A parameter `elsewhere` is declared by another module, which shares it: an embedding tied to a head on one rank.
    Raises ValueError naming all that were never declared, or that claim one logical name.
    """
    found: dict[nn.Parameter, Declared] = {}
    unknown: dict[nn.Parameter, str] = {}
    for path, module in model.named_modules(prefix=prefix):
        declared = module.__dict__.get(_DECLARED, {})
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            full = f"{path}.{name}" if path else name
            if param in elsewhere:
                continue
            if name in declared:
                found.setdefault(param, Declared(full, param, tuple(_logical(path, name, declared[name]))))
            else:
                unknown[param] = full
    unknown = {p: full for p, full in unknown.items() if p not in found}  # shared with the module that declared it
    if unknown:
        raise ValueError(
            "parameters without a declared place: "
            + ", ".join(unknown.values())
            + "; call stretto.declare(module, name, ParamSpec(...)) where each is created, or stretto.replicate(module)"
            " if every rank holds it whole and has all of its gradient"
        )
    names = Counter(part.name for item in found.values() for part in item.logical)
    if twice := [name for name, times in names.items() if times > 1]:
        raise ValueError(f"logical names declared by more than one parameter: {', '.join(twice)}")
    return tuple(found.values())


def declared_in(module: nn.Module) -> tuple[str, ...]:
    """The names of the parameters that were declared on this very module."""
    return tuple(module.__dict__.get(_DECLARED, ()))


def _logical(path: str, name: str, declared: Sequence[tuple[ParamSpec, Block]]) -> Iterator[Logical]:
    row = 0
    for spec, block in declared:
        owner = path.rpartition(".")[0]
        module = ".".join(p for p in (owner, spec.part) if p) if spec.part else path
        yield Logical(spec.name or ".".join(p for p in (module, name) if p), spec, block, row)
        row += block.stored[0] if block.stored else 1
