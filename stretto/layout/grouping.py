"""Which tensors of a stage share flat storage. Numbers alone: the engine and the estimate of memory both read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final, NamedTuple

LARGEST: Final = 9 * 2**24
"""Elements of a section that are gathered and reduced as one, 576 MiB of gradients: they are reduced while the rest of
the section's fill, and two such regions, not two sections, wait for their sums."""
LITTLE: Final = 8
"""What is less than one of so many parts of a section is not gathered with it."""


class Stored(NamedTuple):
    """A stored tensor of a stage, in the order of the forward.

    `kind` is what those that share storage must have in common; `section` the part of the stage that uses it first,
    None where no part of its own does. What is `quantized` is gathered so where it is sharded.
    """

    numel: int
    kind: tuple[object, ...]
    decayed: bool
    section: int | None = None
    quantized: bool = False


def by_size(tensors: Sequence[Stored], limit: int) -> list[list[int]]:
    """Groups of at most `limit` elements (a larger tensor stands alone), in the order in which a backward fills them.

    Decayed and other tensors are apart.
    """
    groups: list[list[int]] = []
    open_: dict[tuple[object, ...], list[int]] = {}
    filled: dict[tuple[object, ...], int] = {}
    for n in reversed(range(len(tensors))):
        kind, numel = (*tensors[n].kind, tensors[n].decayed), tensors[n].numel
        if kind not in open_ or numel + filled[kind] > limit:
            open_[kind], filled[kind] = [], 0
            groups.append(open_[kind])
        open_[kind].append(n)
        filled[kind] += numel
    return _as_filled(groups)


def by_section(tensors: Sequence[Stored], limit: int = LARGEST) -> list[list[int]]:
    """Groups of each section, and of what is in none, in the order in which a backward fills them.

    A group has at most `limit` elements (a larger tensor stands alone). What is gathered quantized has groups of its
    own. What little else its section has is with what is in none: a gather takes longer to begin than to bring that.
    Decayed tensors lie before the others, so that an optimizer has two ranges.
    """
    little, groups = _little(tensors), dict[tuple[object, ...], list[int]]()
    for n, tensor in enumerate(tensors):
        alone = tensor.quantized or (tensor.kind[0], tensor.section) not in little
        groups.setdefault((*tensor.kind, tensor.quantized, tensor.section if alone else None), []).append(n)
    cut = [part for group in groups.values() for part in _cut(group, [tensors[n].numel for n in group], limit)]
    return [sorted(group, key=lambda n: not tensors[n].decayed) for group in _as_filled(cut)]


def _cut(group: list[int], sizes: list[int], limit: int) -> list[list[int]]:
    """Parts of a group, each filled from its end on."""
    parts, left = list[list[int]](), 0
    for n, numel in zip(reversed(group), reversed(sizes), strict=True):
        if not parts or numel > left:
            parts.append([])
            left = limit
        parts[-1].insert(0, n)
        left -= numel
    return parts


def _little(tensors: Sequence[Stored]) -> set[tuple[object, int | None]]:
    """Sections, by what their tensors share first, in which less than an eighth is not quantized beside what is."""
    quantized, others = Counter[tuple[object, int | None]](), Counter[tuple[object, int | None]]()
    for tensor in tensors:
        (quantized if tensor.quantized else others)[tensor.kind[0], tensor.section] += tensor.numel
    return {where for where, numel in quantized.items() if LITTLE * others[where] < numel}


def _as_filled(groups: list[list[int]]) -> list[list[int]]:
    """A group is full with its first tensor of the forward."""
    return sorted(groups, key=lambda group: -min(group))
