"""Low-rank adapters of the parallel linear layers: y = W x + s B (A x), W as it is.

Hu et al., "LoRA", 2021. A [r, d_in] and B [d_out, r] are cut as W is: where tp cuts W along d_out it cuts B, where
along d_in it cuts A, and the other one every rank holds whole. Both products lie inside the tensor-parallel region,
before the sum over its ranks, so an adapter adds no communication to a forward; of what is held whole each rank has a
part of the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stretto.arguments.sections import TuningConfig
from stretto.params import Init, ParamSpec, Shard
from stretto.random import chance, dropped, stream_key
from stretto.structure import Structure
from stretto.tensor_parallel.build import Build
from stretto.tensor_parallel.linear import linear
from stretto.tensor_parallel.mappings import enter, leave
from stretto.tensor_parallel.pointwise import Lazy

if TYPE_CHECKING:
    from stretto.tensor_parallel.layers import Projection


@dataclass(frozen=True)
class Lora:
    """Adapters of this rank on the matrices named `targets`, such as q_proj; what they add is multiplied by `scale`."""

    rank: int
    scale: float
    targets: frozenset[str]
    dropout: float = 0.0


def lora_of(tuning: TuningConfig) -> Lora | None:
    """The adapters that the settings describe."""
    if not tuning.lora_rank:
        return None
    targets = frozenset(f"{name}_proj" for name in tuning.lora_targets)
    return Lora(tuning.lora_rank, tuning.lora_alpha / tuning.lora_rank, targets, tuning.lora_dropout)


class Drop:
    """What falls away of the input of the adapter `name` in training, from channel `first` on.

    The mask is that of `Dropout`: a function of the seed, the name and the element's place in the run alone.
    """

    def __init__(self, lora: Lora, name: str, seed: int, first: int = 0) -> None:
        self.p, self.name, self.first = lora.dropout, name, first
        self._keys = stream_key(seed, f"dropout/{name}.lora")

    def __call__(self, x: Tensor, structure: Structure | None) -> Tensor:
        """x [s, b, d], where gradients are recorded and something is to fall away another one."""
        if not self.p or not torch.is_grad_enabled():
            return x
        if structure is None or structure.samples is None:
            raise ValueError(f"{self.name} drops with p={self.p:g}, but is not told which samples it has")
        places = structure.places_of(0, x.shape[0], x.device)
        mask = dropped(self._keys, structure.samples, places, x.shape[-1], self.p, self.first)
        return x.masked_fill(mask, 0.0) * (1 / (1 - chance(self.p)))


def specs_of_columns(lora: Lora, d_in: int, parts: Sequence[Projection]) -> tuple[list[ParamSpec], list[ParamSpec]]:
    """Of the matrices A and B of those parts, among some that tp cuts along d_out, that have an adapter."""
    parts = [part for part in parts if part.name in lora.targets]
    first = [_whole((lora.rank, d_in), _deviates(d_in), part.name) for part in parts]
    second = [
        ParamSpec(
            (part.d_out, lora.rank),
            Init(),
            shard=(Shard("tp", 0, copies=part.copies),),
            sum_grad=("tp",) if part.copies > 1 else (),
            part=part.name,
        )
        for part in parts
    ]
    return first, second


def specs_of_rows(lora: Lora, d_in: int, d_out: int) -> tuple[list[ParamSpec], list[ParamSpec]]:
    """Of A and B of a matrix that tp cuts along d_in."""
    first = ParamSpec((lora.rank, d_in), _deviates(d_in), shard=(Shard("tp", 1),))
    return [first], [_whole((d_out, lora.rank), Init())]


def column(
    x: Tensor | Lazy,
    weight: nn.Parameter,
    bias: Tensor | None,
    adapter: Columns,
    a: Tensor,
    b: Tensor,
    structure: Structure | None = None,
) -> Tensor:
    """[s(/t), b, d_in] -> [s, b, d_out/t]: W with its parts' adapters, a [n r, d_in] and b [rows of them, r]."""
    build = adapter.build
    x = enter(_made(x), build.tp, sequence_parallel=build.sequence_parallel, overlap_with=build.overlap_with)
    y = linear(x, weight, bias, build.alone, column=True)
    if adapter.lora.dropout:  # each adapter has a mask of its own
        each = torch.split(a, adapter.lora.rank)
        low = tuple(F.linear(drop(x, structure), one) for drop, one in zip(adapter.drops, each, strict=True))
    else:
        low = torch.split(F.linear(x, a), adapter.lora.rank, -1)
    into = torch.split(b, [rows for rows, adapted in adapter.parts if adapted])
    rows_of_all = [rows for rows, _ in adapter.parts]
    found, n = [], 0
    for part, (_, adapted) in zip(torch.split(y, rows_of_all, -1), adapter.parts, strict=True):
        found.append(part + adapter.lora.scale * F.linear(low[n], into[n]) if adapted else part)
        n += adapted
    return torch.cat(found, -1) if len(found) > 1 else found[0]


def row(
    x: Tensor | Lazy,
    weight: nn.Parameter,
    lora: Lora,
    build: Build,
    a: Tensor,
    b: Tensor,
    drop: Drop,
    structure: Structure | None = None,
) -> Tensor:
    """[s, b, d_in/t] -> [s(/t), b, d_out]."""
    x = _made(x)
    y = linear(x, weight, None, build.alone, column=False)
    y = y + lora.scale * F.linear(F.linear(drop(x, structure), a), b)
    return leave(y, build.tp, sequence_parallel=build.sequence_parallel, overlap_with=build.overlap_with)


@dataclass(frozen=True)
class Columns:
    """The adapters of a matrix that is several ones stacked: rows of each on this rank, and whether it has one."""

    lora: Lora
    build: Build
    parts: tuple[tuple[int, bool], ...]
    drops: tuple[Drop, ...]
    """Of those that have one, in turn."""


def _made(x: Tensor | Lazy) -> Tensor:
    """The input as a tensor that is kept: A's gradient needs it, and that of W is none."""
    return x.made() if isinstance(x, Lazy) else x


def _deviates(d_in: int) -> Init:
    """With the variance of the uniform ones, up to 1/sqrt(d_in), that others draw."""
    return Init(std=(3 * d_in) ** -0.5)


def _whole(shape: tuple[int, ...], init: Init, part: str = "") -> ParamSpec:
    return ParamSpec(shape, init, sum_grad=("tp",), part=part)
