"""Attention over cp: every way of ours, and a plain ring, against one rank with the same work for each.

    torchrun --nproc-per-node 2 -m benchmarks.context_parallel [--tokens 8192] [--packed] [--device cuda] [--calls 20]

`--tokens` are those of a rank. The plain ring is the textbook's (Liu et al., 2023; Zhu, "ring-flash-attention", 2024):
one block of keys after another, all transfers waited for, each block's output merged in the dtype of the run.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from stretto import Layout, ParallelState, initialize
from stretto.attention import PLAIN, Attend, Scores, causal_attention
from stretto.attention.tile import tile_kernel
from stretto.batch import Batch
from stretto.collectives import shift_async
from stretto.context_parallel import ContextAttention
from stretto.structure import SequenceCut, Structure
from stretto.world import Axis


def rows(length: int, *, packed: bool) -> Batch:
    """One row; packed, of documents of a quarter of it at most."""
    starts = None
    if packed:
        rng, lengths = random.Random(0), list[int]()
        while sum(lengths) < length:
            lengths.append(min(rng.randint(1, length // 4), length - sum(lengths)))
        starts = torch.from_numpy(np.repeat(np.cumsum([0, *lengths[:-1]]), lengths))[None]
    tokens = torch.zeros(1, length, dtype=torch.int64)
    return Batch(tokens, tokens, torch.ones_like(tokens, dtype=torch.bool), starts=starts)


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


def timed(call: Callable[[], object], device: torch.device, calls: int) -> float:
    """Mean seconds of so many calls, the same on all ranks, after one to get warm."""
    sync = torch.cuda.synchronize if device.type == "cuda" else bool
    call()
    sync()
    began = time.perf_counter()
    for _ in range(calls):
        call()
    sync()
    return (time.perf_counter() - began) / calls


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--calls", type=int, default=20)
    said = parser.parse_args(words)
    dtype = torch.bfloat16 if said.device == "cuda" else torch.float32
    with initialize(device=said.device) as world, ParallelState.build(Layout.of(cp=world.size), world) as state:
        cp, alone = state.axis("cp"), Axis.single("cp", world.rank)
        batch = rows(said.tokens * cp.size, packed=said.packed)
        structure = SequenceCut(cp.rank, cp.size).of(batch)[1].to(world.device)

        def inputs(n: int) -> list[Tensor]:
            return [
                torch.randn(1, h, n, said.dim, dtype=dtype, device=world.device).requires_grad_()
                for h in (said.heads, said.kv_heads, said.kv_heads)
            ]

        kernel = tile_kernel(world.device)
        ways: dict[str, tuple[Attend, Structure | None, int]] = {}
        # One rank with the same work: a row of cp times the queries' keys has the root of cp times the tokens.
        same = round(said.tokens * cp.size**0.5)
        ways["one rank, same work"] = causal_attention, None, same
        for name, inner, outer, way in (
            ("all-gather", alone, cp, "all-gather"),
            ("ring", alone, cp, "ring"),
            ("ulysses", cp, alone, "all-gather"),
        ):
            ways[name] = ContextAttention(causal_attention, kernel, inner, outer, way), structure, structure.slots  # type: ignore[arg-type]
        ways["plain ring"] = plain_ring(cp, world.device), structure, structure.slots
        table = Table("way", "forward, ms", "forward and backward, ms", box=None)
        for name, (attend, known, n) in ways.items():
            q, k, v = inputs(n)

            def forward(attend: Attend = attend, q: Tensor = q, k: Tensor = k, v: Tensor = v, at=known) -> Tensor:  # type: ignore[no-untyped-def]
                return attend(q, k, v, PLAIN, at)

            def both(forward: Callable[[], Tensor] = forward) -> None:
                y = forward()
                y.backward(torch.ones_like(y))

            with torch.no_grad():
                one = timed(forward, world.device, said.calls)
            two = None if name == "plain ring" else timed(both, world.device, said.calls)
            table.add_row(name, f"{1e3 * one:.2f}", "" if two is None else f"{1e3 * two:.2f}")
        if world.rank == 0:
            Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
