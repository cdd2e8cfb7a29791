"""Dropout that does not know the layout: what falls away depends on an element's place in the run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stretto.random import chance, dropped, stream_key
from stretto.structure import Structure
from stretto.tensor_parallel.build import Build


class Dropout(nn.Module):
    """Sets elements of x [s(/t), b, h] to zero with probability p, and scales the others up by 1 / (1 - p).

    The mask is a function of `build.seed`, `name`, the sample's number in the run, place in it and channel, so every
    layout and every size of the microbatch draws its part of the same one: ranks that hold the whole sequence
    draw alike, and under sequence or context parallelism each draws its own places.

    Something falls away only in training: the module is in training mode and gradients are being recorded. So an
    evaluation or a sample under `torch.no_grad()` needs no switch, and a recomputation draws what the forward drew.
    p is rounded to a multiple of 2^-16, neither 0 nor 1; at p = 0 the module is the identity.
    """

    def __init__(self, p: float, name: str, build: Build) -> None:
        super().__init__()
        self.p, self.name, self.tp = p, name, build.tp
        self.sequence_parallel = build.sequence_parallel
        self.keys = stream_key(build.seed, f"dropout/{name}")

    def forward(self, x: Tensor, structure: Structure) -> Tensor:
        if self.p == 0 or not (self.training and torch.is_grad_enabled()):
            return x
        if structure.samples is None:
            raise ValueError(
                f"{self.name} drops with p={self.p:g}, but the batch does not say which samples it has: give "
                "Batch(.., samples=) their numbers in the run, int64 [b], call under torch.no_grad(), or set dropout=0"
            )
        n = x.shape[0]
        places = structure.places_of(self.tp.rank if self.sequence_parallel else 0, n, x.device)
        mask = dropped(self.keys, structure.samples, places, x.shape[-1], self.p)
        return x.masked_fill(mask, 0.0) * (1 / (1 - chance(self.p)))

    def extra_repr(self) -> str:
        return f"p={self.p:g}, {self.name}"
