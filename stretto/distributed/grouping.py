"""Which parameters of a stage share a bucket."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from torch import nn

from stretto.layout.grouping import Stored, by_section, by_size
from stretto.params import Declared


def fill_buckets(items: Sequence[Declared], limit: float) -> list[list[Declared]]:
    """Buckets of at most `limit` bytes of gradient (a larger parameter stands alone); `items` are in forward order."""
    wide = max((max(4, item.param.element_size()) for item in items), default=4)
    return [[items[n] for n in group] for group in by_size([_stored(item) for item in items], int(limit) // wide)]


def fill_units(
    items: Sequence[Declared],
    sections: Sequence[Sequence[nn.Module]],
    quantized: Callable[[nn.Parameter], bool] | None = None,
    outside: Container[nn.Parameter] = (),
) -> list[list[Declared]]:
    """A bucket for each section, and one for what is used `outside` of them; what is gathered `quantized` is apart."""
    section: dict[nn.Parameter, int] = {}
    for n, modules in enumerate(sections):
        for param in (p for module in modules for p in module.parameters() if p not in outside):
            section.setdefault(param, n)
    taken = {item.param for item in items if quantized is not None and quantized(item.param)}
    found = [_stored(item)._replace(section=section.get(item.param), quantized=item.param in taken) for item in items]
    return [[items[n] for n in group] for group in by_section(found)]


def _stored(item: Declared) -> Stored:
    """A tied embedding stands alone: the stages that hold it must cut it alike, whatever else they hold."""
    alone = any("embed" in part.spec.sum_grad for part in item.logical)
    kind = (item.replicas, item.param.dtype, item.param.requires_grad, item.name if alone else "")
    return Stored(item.param.numel(), kind, item.weight_decay)
