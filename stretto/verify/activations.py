"""Activations and their gradients, module by module, in a form that no layout changes.

A rank sees a part of an activation: some rows of the batch, perhaps a part of the sequence or of the features. Whole
activations of a real model do not fit into a comparison, so each is projected: for row b of the global batch

    p[b, k] = sum over s, f of u[s, k] x[s, b, f] v[f, k]

with normal deviates u and v that are functions of the global place. The projection is linear, so those of the ranks
add up to the whole one's; and where two activations differ by d, their projections differ by about the 2-norm of d,
and by nothing only if d is zero.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stretto.exchange import all_gather_json, all_gather_tensors
from stretto.models import Microbatch, Transformer
from stretto.models.block import Block
from stretto.models.feed_forward import FeedForward
from stretto.models.halves import Halves
from stretto.models.norm import LatentNorm
from stretto.params import Logical, collect
from stretto.random import normal_
from stretto.structure import Structure
from stretto.tensor_parallel import ColumnParallelLinear, WithResidual
from stretto.world import Axis

WIDTH = 8
"""Projections of each row."""


@dataclass(frozen=True)
class Piece:
    """What a module's output [.., n] holds of the activation `name`: features `row`..`row + size` of the output are
    features `offset`.. of the whole. `copies` ranks hold the same."""

    name: str
    row: int
    size: int | None
    offset: int
    copies: int


@dataclass(frozen=True)
class Seen:
    """Projections [rows of the batch, WIDTH] of every module's output, and of its gradient, in forward order."""

    outputs: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]


class ActivationObserver:
    """Hooks on the modules of a rank's stages, there within a `with`.

    `mine` are the microbatches of this rank and their rows of the global batch, which has `shape` [rows, s]. Under
    sequence parallelism parts of what is here of a sequence are told from all of it by their length.
    """

    def __init__(
        self,
        stages: Mapping[int, Transformer],
        tp: Axis,
        mine: Sequence[tuple[Microbatch, slice]],
        shape: tuple[int, int],
    ) -> None:
        self.stages, self.tp, self.mine, self.shape = stages, tp, mine, shape
        self.outputs: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self._stage_of: dict[str, int] = {}
        self._rows: slice | None = None
        self._seen: dict[str, int] = {}
        self._structure: Structure | None = None
        self._directions: dict[tuple[str, int, int], Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for number, stage in self.stages.items():
            self._hooks.append(stage.register_forward_pre_hook(self._begin))
            self._hooks.append(stage.register_forward_hook(self._end))
            others = {p for other in self.stages.values() if other is not stage for p in other.parameters()}
            for module, pieces in pieces_of(stage, elsewhere=others):
                self._stage_of |= {p.name: number for p in pieces}
                self._hooks.append(module.register_forward_hook(partial(self._output, pieces)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def gather(self, world: Axis) -> Seen:
        """What all ranks saw together, on every rank."""
        order = [[self._stage_of[name], name] for name in self.outputs]
        own = {f"x/{n}": x for n, x in self.outputs.items()} | {f"dx/{n}": x for n, x in self.gradients.items()}
        names, tensors = all_gather_json(order, world), all_gather_tensors(own, world)
        everyone = [
            (stage, name, seen[f"x/{name}"], seen.get(f"dx/{name}"))
            for listed, seen in zip(names, tensors, strict=True)
            for stage, name in listed
        ]
        outputs: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        for _, name, x, dx in sorted(everyone, key=lambda each: each[0]):
            outputs[name] = outputs[name] + x if name in outputs else x
            if dx is not None:
                gradients[name] = gradients[name] + dx if name in gradients else dx
        return Seen(outputs, gradients)

    def _begin(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._rows = next(rows for microbatch, rows in self.mine if microbatch is args[1])
        self._structure = args[1].known_structure

    def _end(self, *_: Any) -> None:
        self._rows = None

    def _output(self, pieces: Sequence[Piece], module: nn.Module, args: Any, x: Any) -> None:
        rows, structure = self._rows, self._structure
        # A recomputation, in a backward: its outputs were seen, and no gradient comes to them.
        if rows is None or structure is None:
            return
        if isinstance(x, Halves):
            for half in x.both:
                half.when_through(partial(self._output, pieces, module, args))
            return
        x = x.output if isinstance(x, WithResidual) else x
        # The norm of a head, [s, b, heads, d], or what is made only by whoever takes it: seen further on.
        if not isinstance(x, Tensor) or x.dim() != 3:
            return
        number, every = x.shape[1], rows.stop - rows.start
        if number < every:  # of a microbatch in halves a module sees one after the other
            first = self._seen.get(pieces[0].name, 0) % every
            self._seen[pieces[0].name] = first + number
            structure = structure.of_rows(slice(first, first + number))
            rows = slice(rows.start + first, rows.start + first + number)
        self._add(self.outputs, pieces, rows, structure, x.detach(), whole=True)
        if x.requires_grad:  # not where all in front of it is frozen
            x.register_hook(lambda dx: self._add(self.gradients, pieces, rows, structure, dx, whole=False))  # type: ignore[no-untyped-call]

    def _add(
        self,
        into: dict[str, Tensor],
        pieces: Sequence[Piece],
        rows: slice,
        structure: Structure,
        x: Tensor,
        *,
        whole: bool,
    ) -> None:
        """Add the projections of this rank's part [s(/t), b, n]; ranks with the same part count as one together.

        The gradient of features that several ranks hold, and use for different heads, is not `whole` on any of them:
        there the parts add up.
        """
        n, cut = x.shape[0], x.shape[0] < structure.slots
        places = structure.places_of(self.tp.rank if cut else 0, n, x.device)
        along = self._direction("sequence", structure.length, 0, x.device)
        # Slots without a token count for nothing.
        u = along[places.clamp(max=structure.length - 1)] * (places < structure.length)[..., None]
        u = u.view(n, -1, WIDTH).expand(n, x.shape[1], WIDTH)
        for p in pieces:
            part = x if p.size is None else x.narrow(-1, p.row, p.size)
            v = self._direction("features", part.shape[-1], p.offset, x.device)
            same = (1 if cut else self.tp.size) if p.size is None else (p.copies if whole else 1)
            if p.name not in into:
                into[p.name] = x.new_zeros((self.shape[0], WIDTH), dtype=torch.float64)
            into[p.name][rows] += torch.einsum("sbf,sbk,fk->bk", part.double(), u, v) / same

    def _direction(self, name: str, n: int, offset: int, device: torch.device) -> Tensor:
        """Rows `offset`..`offset + n` of the directions [.., WIDTH] along one dimension of all activations."""
        key = (name, n, offset)
        if key not in self._directions:
            rows = torch.empty((n, WIDTH), dtype=torch.float64, device=device)
            shape = (offset + n, WIDTH)  # element (i, k) is the same in every longer one
            normal_(rows, seed=0, name=name, full_shape=shape, offsets=(offset, 0), std=1.0)
            self._directions[key] = rows
        return self._directions[key]


def pieces_of(stage: nn.Module, elsewhere: Container[nn.Parameter] = ()) -> Iterator[tuple[nn.Module, list[Piece]]]:
    """The modules whose outputs are activations, under Hugging Face names, and what these hold.

    `elsewhere` are parameters of other stages, with which this one may share an embedding.
    """
    logical = {item.name: item.logical for item in collect(stage, elsewhere=elsewhere)}
    # Of a sequence in chunks each is computed by itself, twice: what they add up to is seen in the block.
    chunked = [m for m in stage.modules() if isinstance(m, FeedForward) and m.chunks > 1]
    unseen = {inner for m in chunked for inner in m.modules()}
    for path, module in stage.named_modules():
        if module in unseen:
            continue
        if isinstance(module, LatentNorm):  # of the same on all ranks, each of which uses it for its own heads
            yield module, [Piece(path, 0, module.dim, 0, module.ranks)]
        elif isinstance(module, ColumnParallelLinear):
            yield module, [_features(part) for part in logical[f"{path}.weight"]]
        elif isinstance(module, Block):
            if module.mlp is not None:  # a block whose feed-forward is on the next stage puts nothing out here
                yield module, [Piece(path, 0, None, 0, 1)]
        # The head's output is seen in the loss: all logits never exist.
        elif any(True for _ in module.parameters(recurse=False)):
            yield module, [Piece(path, 0, None, 0, 1)]


def _features(part: Logical) -> Piece:
    """Features of the output of a column-parallel layer lie as the rows of its weight."""
    copies = next((cut.copies for cut in part.spec.shard), 1)
    return Piece(part.name.removesuffix(".weight"), part.row, part.block.shape[0], part.block.offsets[0], copies)
