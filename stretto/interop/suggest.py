"""How to write the plan of a model that none is known of, with the names of its own modules."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from stretto.tensor_parallel.foreign_layers import is_conv1d, is_scaled

_SHOWN = 24
"""Names of modules in a message."""


def suggestion(model: nn.Module) -> str:
    """What a plan says, one that holds for this model, and the modules that it may say more of."""
    plan = suggested(model)
    said = ", ".join(f'"{pattern}": "{word}"' for pattern, word in plan.items())
    modules = list(dict.fromkeys(f"{_pattern(name)}: {_kind(part)}" for name, part in _holders(model)))
    more = f"; and {len(modules) - _SHOWN} more" if len(modules) > _SHOWN else ""
    return (
        "Write one: it says of each module by patterns of names whether it is colwise (cut by outputs), rowwise (by "
        "inputs), vocab, or replicated. This one cuts its feed-forwards and words: "
        f"parallelize(model, {{{said}}}, axis). Attention is cut by Colwise(heads) for queries, keys and values, "
        "Rowwise(heads) for the output, and Around(attributes={...}) for the numbers of heads that its forward reads "
        f"(stretto.tensor_parallel.foreign_layers). Modules with parameters: {'; '.join(modules[:_SHOWN])}{more}"
    )


def suggested(model: nn.Module) -> dict[str, str]:
    """A plan of words alone: it cuts the vocabulary, and pairs of layers outside attention that widen and narrow again
    with nothing else beside them, which hold if the forward is elementwise between them."""
    plan: dict[str, str] = {}
    for name, part in model.named_modules():
        own = [(n, p, shape) for n, p in part.named_children() if (shape := _linear(p)) is not None]
        wider = [(n, shape) for n, _, shape in own if shape[1] > shape[0]]
        narrower = [(n, shape) for n, _, shape in own if shape[1] < shape[0]]
        attends = any(word in name.lower() for word in ("attn", "attention"))
        if (
            not attends
            and len(narrower) == 1
            and 1 <= len(wider) <= 2
            and all(shape == narrower[0][1][::-1] for _, shape in wider)
        ):
            prefix = f"{_pattern(name)}." if name else ""
            plan |= {f"{prefix}{n}": "colwise" for n, _ in wider} | {f"{prefix}{narrower[0][0]}": "rowwise"}
    get = getattr(model, "get_input_embeddings", None), getattr(model, "get_output_embeddings", None)
    ends = [each for each in (call() for call in get if callable(call)) if isinstance(each, nn.Module)]
    for name, part in model.named_modules():
        if any(part is each for each in ends) and (type(part) in (nn.Embedding, nn.Linear) or is_scaled(part)):
            plan[name] = "vocab"
    return {**plan, "*": "replicated"}


def _linear(part: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a layer that can be cut."""
    if type(part) is nn.Linear:
        return part.in_features, part.out_features
    if is_conv1d(part):
        n_in, n_out = part.get_parameter("weight").shape
        return n_in, n_out
    return None


def _holders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, part in model.named_modules():
        if next(part.parameters(recurse=False), None) is not None:
            yield name, part


def _pattern(name: str) -> str:
    """The numbers of layers are anything."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


def _kind(part: nn.Module) -> str:
    shapes = ", ".join(f"{name} {list(p.shape)}" for name, p in part.named_parameters(recurse=False))
    return f"{type(part).__name__} ({shapes})"
