"""An existing module over tensor-parallel ranks, in place: what its layers are is said by name, not written anew.

    parallelize(model, {"*.up": "colwise", "*.down": "rowwise", "*norm": "replicated"}, state.axis("tp"))

The module keeps its layers, their names and its forward; of each layer's parameters this rank keeps its part, declared,
so that `shard`, `Trainer` and checkpoints take it under the names that it had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Final, TypeVar

import torch
from torch import Tensor, nn

from stretto.collectives import broadcast
from stretto.params import ParamSpec, Shard, declare
from stretto.tensor_parallel.foreign_layers import (
    Around,
    Colwise,
    Experts,
    Replicated,
    Rowwise,
    Style,
    Vocab,
    is_conv1d,
    is_scaled,
    take_over,
)
from stretto.world import Axis

M = TypeVar("M", bound=nn.Module)

Plan = Mapping[str, Style | str]
"""Styles of modules, or their words, by patterns of their names; of two patterns that match the first counts."""

WORDS: Final[Mapping[str, Style]] = MappingProxyType(
    {
        "colwise": Colwise(),
        "rowwise": Rowwise(),
        "vocab": Vocab(),
        "replicated": Replicated(),
        "sequence": Replicated(partial=True),
    }
)


def parallelize(module: M, plan: Plan, axis: Axis) -> M:
    """Cut the layers of `module` over the ranks of `axis` as `plan` says, in place; returns the module.

    All ranks begin with the values of the first. The outputs, gradients and updates of the module stay what they were;
    activations are [b, s, h].

    Args:
        plan: by pattern of module names (`*` stands for anything) a style, or its word: colwise, rowwise, vocab,
            replicated, or sequence for what each rank applies to its part of the sequence, or to its heads.

    Raises:
        ValueError: units do not divide, a layer is none that can be cut, parameters are in no pattern, a pattern is in
            no module, dropout would differ from rank to rank. The module is then as it was.
    """
    found = _matched(module, plan)
    _reject_dropout(module)
    cuts = [(name, part, style, _specs(name, part, style, axis)) for name, part, style in found]
    _reject_two_ways(cuts)
    kept: dict[nn.Parameter, nn.Parameter] = {}
    for _, part, style, specs in cuts:
        for own, spec in specs.items():
            whole: nn.Parameter = getattr(part, own)
            if whole not in kept:
                kept[whole] = nn.Parameter(_part_of(whole, spec, axis), requires_grad=whole.requires_grad)
            setattr(part, own, kept[whole])
            declare(part, own, spec, axes=[axis])
        take_over(part, style, axis)
    return module


def _matched(module: nn.Module, plan: Plan) -> list[tuple[str, nn.Module, Style]]:
    """Each module with a style, in order. Raises ValueError for what no pattern, and no module, covers."""
    styles = {pattern: _style(pattern, style) for pattern, style in plan.items()}
    found, unused, loose = [], set(plan), []
    for name, part in module.named_modules():
        pattern = next((p for p in plan if fnmatchcase(name, p)), None)
        if pattern is not None:
            unused.discard(pattern)
            found.append((name, part, styles[pattern]))
        if pattern is None or isinstance(styles[pattern], Around):
            loose += [f"{name}.{own}".lstrip(".") for own, _ in part.named_parameters(recurse=False)]
    if unused:
        raise ValueError(f"no module has a name like {', '.join(sorted(unused))}")
    if loose:
        raise ValueError(
            f"no pattern of the plan says how {', '.join(loose[:8])}{' ...' * (len(loose) > 8)} lie on the ranks: name "
            'them, as "replicated" if each rank holds them whole'
        )
    return found


def _style(pattern: str, style: Style | str) -> Style:
    if not isinstance(style, str):
        return style
    if style not in WORDS:
        raise ValueError(f"{pattern}: no style {style!r}; take one of {', '.join(WORDS)}")
    return WORDS[style]


def _reject_dropout(module: nn.Module) -> None:
    for name, part in module.named_modules():
        chances = {"p": part.p} if isinstance(part, nn.Dropout) else {}
        chances |= {
            k: v for k, v in vars(part).items() if k.endswith(("dropout", "jitter_noise")) and isinstance(v, float)
        }
        for own, chance in chances.items():
            if chance > 0:
                drawn = "noise" if own.endswith("noise") else "the masks of dropout"
                raise ValueError(
                    f"{name}.{own} = {chance:g}: torch draws {drawn} from where a rank is, so the layout "
                    "would change the model; set it to 0"
                )


def _specs(name: str, part: nn.Module, style: Style, axis: Axis) -> dict[str, ParamSpec]:
    """The spec of each parameter of a module. Raises ValueError where it cannot be cut so."""
    if isinstance(style, Around):
        return {}
    own = dict(part.named_parameters(recurse=False))
    if isinstance(style, Replicated):
        parts = (axis.name,) if style.partial else ()
        alone = isinstance(part, nn.Embedding)
        return {
            n: ParamSpec(tuple(p.shape), None, sum_grad=parts, weight_decay=p.dim() > 1, elementwise=alone)
            for n, p in own.items()
        }
    if isinstance(style, Experts):
        return _expert_specs(name, own, axis)
    embeds, turned = isinstance(style, Vocab) and isinstance(part, nn.Embedding), is_conv1d(part)
    if not (type(part) is nn.Linear or (embeds and (type(part) is nn.Embedding or is_scaled(part))) or turned):
        raise ValueError(
            f"{name} is a {type(part).__name__}, which is not cut: {type(style).__name__.lower()} takes a torch "
            f"Linear{' or Embedding' if isinstance(style, Vocab) else ', or a Conv1D of transformers'}"
        )
    if isinstance(part, nn.Embedding) and (part.max_norm is not None or part.scale_grad_by_freq or part.sparse):
        raise ValueError(f"{name}: an embedding with max_norm, scale_grad_by_freq or sparse gradients is not cut")
    inputs = isinstance(style, Rowwise)
    dim = int(inputs != turned)
    units = None if isinstance(style, Vocab) else style.units
    sections = style.sections if isinstance(style, Colwise) else ()
    n, copies = own["weight"].shape[dim], 1
    if sections and (sum(sections) != n or (isinstance(style, Colwise) and style.copied)):
        raise ValueError(f"{name}: sections {sections} of {n} rows must add up to them, and are not held in copies")
    if units is not None:
        if isinstance(style, Colwise) and style.copied and axis.size % units == 0:
            copies = max(1, axis.size // units)
        counts = [size * units / n for size in sections or (n,)]
        if n % units or any(count * copies % axis.size for count in counts):
            also = ", or be a multiple of them" if isinstance(style, Colwise) and style.copied else ""
            raise ValueError(
                f"{name}: {' + '.join(f'{count:g}' for count in counts)} heads over {axis.name}={axis.size} ranks: the "
                f"ranks must divide the heads{also}"
            )
    cut = Shard(axis.name, dim, copies=copies, sections=sections)
    partial = (axis.name,) if copies > 1 else ()
    weight = ParamSpec(
        tuple(own["weight"].shape), None, (cut,), sum_grad=partial, elementwise=isinstance(part, nn.Embedding)
    )
    if "bias" not in own:
        return {"weight": weight}
    shape = tuple(own["bias"].shape)
    if inputs:  # added once, after the sum
        once = (axis.name,) if style.border == "sequence" else ()
        return {"weight": weight, "bias": ParamSpec(shape, None, sum_grad=once, weight_decay=False)}
    cut = replace(cut, dim=0)
    return {"weight": weight, "bias": ParamSpec(shape, None, (cut,), sum_grad=partial, weight_decay=False)}


def _expert_specs(name: str, own: Mapping[str, nn.Parameter], axis: Axis) -> dict[str, ParamSpec]:
    """Each expert's inner features are cut. Raises ValueError for experts of another form."""
    up, down = (tuple(own[n].shape) if n in own else () for n in ("gate_up_proj", "down_proj"))
    if len(own) != 2 or len(up) != 3 or len(down) != 3 or up != (down[0], 2 * down[2], down[1]):
        raise ValueError(
            f"{name} holds {', '.join(f'{n} {list(p.shape)}' for n, p in own.items()) or 'no parameters'}: experts are "
            'cut that are gate_up_proj [E, 2 f, h] and down_proj [E, h, f]; name it "replicated" to keep them whole'
        )
    return {
        "gate_up_proj": ParamSpec(up, None, (Shard(axis.name, 1, sections=(down[2], down[2])),)),
        "down_proj": ParamSpec(down, None, (Shard(axis.name, 2),)),
    }


def _reject_two_ways(cuts: list[tuple[str, nn.Module, Style, dict[str, ParamSpec]]]) -> None:
    """Raise ValueError for one parameter of two modules, a tied embedding, that would lie in two ways."""
    known: dict[nn.Parameter, tuple[str, ParamSpec]] = {}
    for name, part, _, specs in cuts:
        for own, spec in specs.items():
            other, first = known.setdefault(getattr(part, own), (name, spec))
            if first.shard != spec.shard:
                raise ValueError(f"{name}.{own} is the parameter of {other}, too: both must be cut the same way")


@torch.no_grad()
def _part_of(whole: nn.Parameter, spec: ParamSpec, axis: Axis) -> Tensor:
    """This rank's part, padded with zeros."""
    block = spec.block({axis.name: axis})
    mine = torch.zeros(block.stored, dtype=whole.dtype, device=whole.device)
    first = broadcast(whole, axis)
    for offsets, view in block.views(mine):
        view.copy_(first[tuple(slice(o, o + n) for o, n in zip(offsets, view.shape, strict=True))])
    return mine
