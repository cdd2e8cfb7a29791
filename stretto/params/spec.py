"""`ParamSpec`: the one statement of how a parameter lies on the ranks.

A *logical* tensor is what one process would hold under the Hugging Face name (`model.layers.3.self_attn.q_proj.weight`,
vocabulary unpadded). A *stored* parameter is what a module computes with: one logical tensor's local block, or several
stacked along dim 0 (q, k and v in one matrix), perhaps with rows of padding. A module declares each once, with a spec
for every logical tensor in it; all else is derived from the declaration and never restates it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from stretto.layout.flat import overlap, rectangles
from stretto.layout.sizes import DENSE, EXPERT
from stretto.world import Axis


@dataclass(frozen=True)
class Shard:
    """Cut `dim` into equal chunks along `axis`. A chunk is ceil(n / parts), rounded up to `multiple`; the last ones
    may hold less, or nothing, and are stored padded. `copies` consecutive positions of the axis hold the same chunk
    (fewer kv heads than ranks): each then has a part of its gradient. Of `sections`, sizes of what stands one after
    another in `dim` (queries, keys and values in one matrix), each is cut by itself, and a rank stores its chunks of
    all of them in their order.
    """

    axis: str
    dim: int
    copies: int = 1
    multiple: int = 1
    sections: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.dim < 0 or self.copies < 1 or self.multiple < 1:
            raise ValueError(f"{self}: dim counts from 0, copies and multiple from 1")
        if self.sections and self.copies > 1:
            raise ValueError(f"{self}: what is cut section by section is not held in copies")


@dataclass(frozen=True)
class Init:
    """Initial values: normal deviates times `std`, around `mean`; a constant when `std` is 0."""

    mean: float = 0.0
    std: float = 0.0


@dataclass(frozen=True)
class ParamSpec:
    """Everything that anyone may ask about one logical tensor's place."""

    shape: tuple[int, ...]
    """Full shape, unpadded."""
    init: Init | None
    """None: the values that the parameter has when it is declared."""
    shard: tuple[Shard, ...] = ()
    sum_grad: tuple[str, ...] = ()
    """Axes whose ranks each hold a part of the gradient: it must be summed over them."""
    replicas: tuple[str, ...] = ("dp", "cp")
    """Axes that data parallelism reduces over."""
    weight_decay: bool = True
    elementwise: bool = False
    """Optimizers of matrices update it element by element, though it is a matrix: embeddings, the head."""
    apart: tuple[str, ...] = ("pp",)
    """Axes whose ranks hold other tensors altogether: stages of a pipeline, and experts along ep."""
    part: str = ""
    """Replaces the module's own name in the logical name: `self_attn.qkv_proj` holds q_proj, k_proj and v_proj."""
    name: str = ""
    """The whole logical name, where it is not derived from the module's place: the copy of a tied embedding."""

    def __post_init__(self) -> None:
        dims = [cut.dim for cut in self.shard]
        if len({*dims}) != len(dims) or any(dim >= len(self.shape) for dim in dims):
            raise ValueError(f"a tensor {self.shape} cannot be cut along dimensions {dims}: each must exist, and once")
        in_sections = [cut for cut in self.shard if cut.sections]
        if len(in_sections) > 1 or any(sum(cut.sections) != self.shape[cut.dim] for cut in in_sections):
            raise ValueError(
                f"a tensor {self.shape} cut in sections {[cut.sections for cut in in_sections]}: along one dimension, "
                "and they must add up to it"
            )

    def block(self, axes: Mapping[str, Axis]) -> Block:
        """The rectangle that a rank at its place on `axes` holds.

        Raises ValueError when an axis is not among `axes` or does not hold a whole number of copies.
        """
        offsets, shape, stored = [0] * len(self.shape), list(self.shape), list(self.shape)
        dim, sections = 0, tuple[Section, ...]()
        for cut in self.shard:
            if cut.axis not in axes:
                raise ValueError(f"cut along {cut.axis}, but only {', '.join(axes) or 'no axis'} was given: pass axes=")
            axis, n = axes[cut.axis], self.shape[cut.dim]
            parts, rest = divmod(axis.size, cut.copies)
            if rest:
                raise ValueError(f"{axis} has {axis.size} ranks, which cannot hold chunks in {cut.copies} copies each")
            place, found, start, at = axis.rank // cut.copies, [], 0, 0
            for size in cut.sections or (n,):
                chunk = -(-size // parts)
                chunk = -(-chunk // cut.multiple) * cut.multiple
                offset = min(place * chunk, size)
                found.append(Section(at, start + offset, min(chunk, size - offset)))
                start, at = start + size, at + chunk
            offsets[cut.dim], shape[cut.dim], stored[cut.dim] = found[0].offset, sum(each.size for each in found), at
            if cut.sections:
                dim, sections = cut.dim, tuple(found)
        return Block(tuple(offsets), tuple(shape), tuple(stored), dim, sections)

    def owned(self, position: Mapping[str, int], over: Sequence[str]) -> bool:
        """Whether this rank, of all along the axes `over` that hold the same block, is the one that counts for it.

        `position` gives the rank's coordinate on each of `over`.
        """
        cut = {s.axis: s.copies for s in self.shard}
        return all(position[a] % cut[a] == 0 if a in cut else position[a] == 0 for a in over)

    @property
    def view(self) -> tuple[str, ...]:
        """The axes on which it lies: those of the experts, where it is cut or repeated along one of them."""
        named = {*self.replicas, *self.apart, *self.sum_grad, *(cut.axis for cut in self.shard)}
        return EXPERT if any(axis.partition(".")[0] in EXPERT[:-1] for axis in named) else DENSE

    def owner(self, position: Mapping[str, int]) -> bool:
        """Whether this rank counts for what it keeps: 0 on each axis along which that is neither cut nor apart.

        `position` has the rank's coordinates as `Layout.position` gives them, less those of axes along which storage
        is sharded. The ends of a pipeline hold the same only of what they both sum.
        """
        same = [*(axis for axis in self.view if axis not in self.apart), *({"embed"} & {*self.sum_grad})]
        return self.owned(position, [axis for axis in position if axis.partition(".")[0] in same])


class Section(NamedTuple):
    """What a rank stores of a section: from `at` of its block on, `size` from `offset` of the logical tensor on."""

    at: int
    offset: int
    size: int


@dataclass(frozen=True)
class Block:
    """A rectangle of a logical tensor (`offsets`, `shape`) and the padded shape in which it is stored.

    Where `dim` is cut section by section it is several rectangles: `offsets` are then those of the first, and `shape`
    has as much as all of them. `parts` has each.
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    stored: tuple[int, ...]
    dim: int = 0
    sections: tuple[Section, ...] = ()

    def parts(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """Of each rectangle: where it is stored in the block, its offsets in the logical tensor, its shape."""
        if not self.sections:
            yield (0,) * len(self.shape), self.offsets, self.shape
        for at, offset, size in self.sections:
            yield (
                tuple(at if d == self.dim else 0 for d in range(len(self.shape))),
                tuple(offset if d == self.dim else o for d, o in enumerate(self.offsets)),
                tuple(size if d == self.dim else n for d, n in enumerate(self.shape)),
            )

    def views(self, stored: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Of each rectangle its offsets in the logical tensor and its place in what is stored, without padding."""
        for at, offsets, shape in self.parts():
            yield offsets, stored[tuple(slice(a, a + n) for a, n in zip(at, shape, strict=True))]


@dataclass(frozen=True)
class Logical:
    """One logical tensor inside a stored parameter: its rows start at `row` of the stored one."""

    name: str
    spec: ParamSpec
    block: Block
    row: int

    def view(self, stored: Tensor) -> Tensor:
        """The local block, of one rectangle, inside `stored` (the parameter, its gradient, a moment), unpadded."""
        ((_, view),) = self.block.views(self._rows(stored))
        return view

    def _rows(self, stored: Tensor) -> Tensor:
        return stored.narrow(0, self.row, self.block.stored[0]) if self.block.stored else stored

    @property
    def span(self) -> range:
        """Its elements of the stored parameter, padding included."""
        begin = self.row * math.prod(self.block.stored[1:])
        return range(begin, begin + math.prod(self.block.stored))

    def pieces(self, stored: Tensor | Part) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """What of the local block is in `stored`: offsets in the logical tensor and views, of a matrix 3 at most."""
        if isinstance(stored, Tensor):
            yield from self.block.views(self._rows(stored))
            return
        begin, inside = self.span.start, overlap(stored.part, self.span)
        for each in rectangles(self.block.stored, range(inside.start - begin, inside.stop - begin)):
            view = stored.flat[begin + each.start - stored.part.start :][: math.prod(each.shape)].view(each.shape)
            for at, offsets, shape in self.block.parts():
                low, n = each.common(at, shape)
                inner = view[tuple(slice(a - o, a - o + k) for a, o, k in zip(low, each.offsets, n, strict=True))]
                if 0 in self.block.shape:  # a rank without any of the tensor says so
                    yield self.block.offsets, inner
                    break
                if 0 not in n:
                    yield tuple(o + a - b for o, a, b in zip(offsets, low, at, strict=True)), inner


@dataclass(frozen=True)
class Part:
    """The elements `part` of a stored parameter, in `flat`."""

    flat: Tensor
    part: range

    def zero_(self) -> Part:
        return Part(self.flat.zero_(), self.part)


@dataclass(frozen=True, eq=False)
class Declared:
    """A stored parameter and the logical tensors in it."""

    name: str
    param: nn.Parameter
    logical: tuple[Logical, ...]

    @property
    def replicas(self) -> tuple[str, ...]:
        """Axes that data parallelism reduces over: the same for all logical tensors stored together."""
        return self.logical[0].spec.replicas

    @property
    def weight_decay(self) -> bool:
        """Whether weight decay applies: the same for all logical tensors stored together."""
        return self.logical[0].spec.weight_decay

    @property
    def matrix(self) -> bool:
        """Whether optimizers of matrices update it as one: the same for all logical tensors stored together."""
        return len(self.logical[0].spec.shape) == 2 and not self.logical[0].spec.elementwise

    @property
    def init_kept(self) -> bool:
        """Whether it starts from the values that it had when it was declared: so for all that is stored together."""
        return self.logical[0].spec.init is None


@dataclass(frozen=True)
class Slice:
    """A rectangle of a logical tensor that this rank holds; `owner` on exactly one of the ranks that hold it."""

    name: str
    tensor: Tensor
    full_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    owner: bool
