"""Attention over cp, in every way of ours, and a plain ring (see `benchmarks.context_parallel`)."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stretto.attention import PLAIN, Attend, Scores, causal_attention
from stretto.attention.tile import tile_kernel
from stretto.batch import Batch
from stretto.collectives import shift_async
from stretto.context_parallel import ContextAttention, merge_
from stretto.context_parallel import Way as Mode
from stretto.context_parallel.parts import Combine
from stretto.kernels import hand_written
from stretto.structure import SequenceCut, Structure
from stretto.world import Axis

OURS = ("all-gather", "needed", "ring", "ulysses")
REFERENCES = ("one rank", "the whole row")
"""As much work as a rank has over cp; and all of it, divided by the ranks."""


@dataclass(frozen=True)
class Case:
    """A row of `tokens` on each rank, and the heads."""

    tokens: int
    heads: int
    kv_heads: int
    dim: int
    packed: bool

    def __str__(self) -> str:
        return f"{self.tokens} tokens a rank, {'packed' if self.packed else 'causal'}"

    def row(self, ranks: int) -> Batch:
        """That of so many ranks; packed, of documents of a quarter of it at most."""
        starts, length = None, self.tokens * ranks
        if self.packed:
            rng, lengths = random.Random(0), list[int]()
            while sum(lengths) < length:
                lengths.append(min(rng.randint(1, length // 4), length - sum(lengths)))
            starts = torch.from_numpy(np.repeat(np.cumsum([0, *lengths[:-1]]), lengths))[None]
        tokens = torch.zeros(1, length, dtype=torch.int64)
        return Batch(tokens, tokens, torch.ones_like(tokens, dtype=torch.bool), starts=starts)


@dataclass(frozen=True)
class Way:
    """One way to compute attention: what is called with how many tokens, and its part of the work of a rank."""

    attend: Attend
    structure: Structure | None
    tokens: int
    places: Tensor | None = None
    """Which tokens of the row are this rank's [tokens]; None: it is the reference for speed alone."""
    work: float = 1.0
    backward: bool = True
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    """In which all calls are made."""


def plain_ring(axis: Axis, device: torch.device) -> Attend:
    """Forward alone: what a backward costs beside it is known to be about two and a half times as much."""
    kernel = tile_kernel(device)

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scores: Scores = PLAIN,
        structure: Structure | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        assert structure is not None
        assert sinks is None
        y, total = torch.zeros_like(q), q.new_full(q.shape[:-1], -torch.inf, dtype=torch.float32)
        for step in range(axis.size):
            keys = ((axis.rank - step) % axis.size,)
            for at, tile in structure.tiles((axis.rank,), keys, scores.window):
                part = at, slice(None), tile.query
                own = kernel.forward(q[part], k[at, :, tile.key], v[at, :, tile.key], tile, scores)
                after = torch.logaddexp(total[part], own[1].float())
                y[part] = y[part] * (total[part] - after).exp()[..., None].to(y.dtype)
                y[part] += (own[0] * (own[1] - after).exp()[..., None]).to(y.dtype)
                total[part] = after
            k, v = (shift_async(x, axis).wait() for x in (k, v))
        return y

    return attend


def merging(device: torch.device) -> Combine:
    """As `stretto train` merges."""
    return hand_written(merge_, merge_) if device.type == "cuda" else merge_


def alone(case: Case, rank: int, device: torch.device, tokens: int) -> tuple[Attend, Structure | None]:
    """Attention of a row of so many tokens that one rank has whole."""
    if not case.packed:
        return causal_attention, None
    axis = Axis.single("cp", rank)
    row = Case(tokens, case.heads, case.kv_heads, case.dim, packed=True).row(1)
    attend = ContextAttention(causal_attention, tile_kernel(device), axis, axis, "all-gather", merging(device))
    return attend, SequenceCut(0, 1).of(row)[1].to(device)


def ours(case: Case, cp: Axis, device: torch.device) -> dict[str, Way]:
    """The references for speed, and what is measured."""
    batch = case.row(cp.size)
    single, kernel = Axis.single("cp", cp.rank), tile_kernel(device)
    structure = SequenceCut(cp.rank, cp.size).of(batch)[1].to(device)
    assert structure.places is not None
    places = structure.places[:, 0]
    if case.packed:
        # One rank with the documents that begin in the first half of its row, at the work of a rank over cp.
        share = area(batch) / cp.size / area(case.row(1))
        ways = {"one rank": Way(*alone(case, cp.rank, device, case.tokens), case.tokens, work=share)}
    else:
        # A row of cp times the queries' keys has the root of cp times the tokens.
        tokens = round(case.tokens * cp.size**0.5)
        ways = {"one rank": Way(*alone(case, cp.rank, device, tokens), tokens)}
    whole = alone(case, cp.rank, device, case.tokens * cp.size)
    ways["the whole row"] = Way(*whole, case.tokens * cp.size, work=1 / cp.size)
    plans: tuple[tuple[str, Axis, Axis, Mode], ...] = (
        ("all-gather", single, cp, "all-gather"),
        ("needed", single, cp, "needed"),
        ("ring", single, cp, "ring"),
        ("ulysses", cp, single, "all-gather"),
    )
    for name, inner, outer, way in plans:
        attend = ContextAttention(causal_attention, kernel, inner, outer, way, merging(device))
        ways[name] = Way(attend, structure, structure.slots, places)
    ways["plain ring"] = Way(plain_ring(cp, device), structure, structure.slots, places, backward=False)
    return ways


def area(batch: Batch) -> float:
    """Pairs of a query and a key that attend to each other."""
    assert batch.starts is not None
    at = torch.arange(batch.starts.shape[1])
    return float((at - batch.starts[0] + 1).sum())
