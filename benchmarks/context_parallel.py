"""Attention over cp: every way of ours, and a plain ring, against one rank with the same work for each.

    torchrun --nproc-per-node 2 -m benchmarks.context_parallel [--tokens 8192] [--packed] [--device cuda] [--calls 20]

`--tokens` are those of a rank. The plain ring is the textbook's (Liu et al., 2023; Zhu, "ring-flash-attention", 2024):
one block of keys after another, all transfers waited for, each block's output merged in the dtype of the run.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from stretto import Layout, ParallelState, initialize
from stretto.attention import PLAIN, Attend, Scores, causal_attention
from stretto.attention.tile import tile_kernel
from stretto.batch import Batch
from stretto.collectives import shift_async
from stretto.context_parallel import ContextAttention
from stretto.parallel_state import GroupOptions
from stretto.structure import SequenceCut, Structure
from stretto.world import Axis, World


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


@dataclass(frozen=True)
class Way:
    """One way to compute attention: what is called with how many tokens, and its part of the work of a rank."""

    attend: Attend
    structure: Structure | None
    tokens: int
    work: float = 1.0
    backward: bool = True
    heads: int | None = None
    """Of keys, where the kernel does not group queries."""


def torch_way(world: World, dim: int) -> Attend:
    """torch's own: the queries, keys and values of all ranks go in, its ring cuts and balances them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("cp",))

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
        own = [x.detach().repeat(1, 1, world.size, 1) for x in (q, k, v)]
        with context_parallel(mesh, buffers=own, buffer_seq_dims=[2, 2, 2]):
            own = [x.requires_grad_(q.requires_grad and torch.is_grad_enabled()) for x in own]
            y: Tensor = F.scaled_dot_product_attention(*own, is_causal=True)
            if y.requires_grad:
                y.backward(torch.ones_like(y))
        return y.detach()

    del dim
    return attend


def ways_of(said: argparse.Namespace, cp: Axis, world: World) -> dict[str, Way]:
    """All of them; the first is the reference."""
    batch = rows(said.tokens * cp.size, packed=said.packed)
    alone, kernel = Axis.single("cp", world.rank), tile_kernel(world.device)
    structure = SequenceCut(cp.rank, cp.size).of(batch)[1].to(world.device)
    if said.packed:
        # One rank with the documents that begin in the first half of its row, at the work of a rank over cp.
        few = rows(said.tokens, packed=True)
        own = SequenceCut(0, 1).of(few)[1].to(world.device)
        share = area(batch) / cp.size / area(few)
        attend = ContextAttention(causal_attention, kernel, alone, alone, "all-gather")
        ways = {"one rank": Way(attend, own, own.slots, share)}
    else:
        # A row of cp times the queries' keys has the root of cp times the tokens.
        ways = {"one rank": Way(causal_attention, None, round(said.tokens * cp.size**0.5))}
    for name, inner, outer, way in (
        ("all-gather", alone, cp, "all-gather"),
        ("ring", alone, cp, "ring"),
        ("ulysses", cp, alone, "all-gather"),
    ):
        ways[name] = Way(ContextAttention(causal_attention, kernel, inner, outer, way), structure, structure.slots)  # type: ignore[arg-type]
    ways["plain ring"] = Way(plain_ring(cp, world.device), structure, structure.slots, backward=False)
    if not said.packed and world.device.type == "cuda":
        ways["torch context_parallel"] = Way(torch_way(world, said.dim), None, said.tokens, heads=said.heads)
    return ways


def area(batch: Batch) -> float:
    """Pairs of a query and a key that attend to each other."""
    assert batch.starts is not None
    at = torch.arange(batch.starts.shape[1])
    return float((at - batch.starts[0] + 1).sum())


def measured(way: Way, said: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Milliseconds of a forward, and of both."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads = way.heads or said.kv_heads
    q, k, v = (
        torch.randn(1, h, way.tokens, said.dim, dtype=dtype, device=device).requires_grad_()
        for h in (said.heads, heads, heads)
    )

    def both() -> None:
        y = way.attend(q, k, v, PLAIN, way.structure)
        if y.requires_grad:
            y.backward(torch.ones_like(y))

    with torch.no_grad():
        one = timed(lambda: way.attend(q, k, v, PLAIN, way.structure), device, said.calls)
    found = {"forward_ms": 1e3 * way.work * one}
    if way.backward:
        found["both_ms"] = 1e3 * way.work * timed(both, device, said.calls)
    return found


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    said = parser.parse_args(words)
    with initialize(device=said.device) as world:
        gpu = world.device.type == "cuda"
        size = said.tokens * 2 * said.kv_heads * said.dim * 2
        options = {"cp": GroupOptions(peer_buffer=size)} if gpu and world.size > 1 else {}
        with ParallelState.build(Layout.of(cp=world.size), world, options=options) as state:
            found: dict[str, dict[str, float]] = {}
            errors: dict[str, str] = {}
            for name, way in ways_of(said, state.axis("cp"), world).items():
                try:
                    found[name] = measured(way, said, world.device)
                except (RuntimeError, ValueError, ImportError) as error:  # a peer: the others are measured
                    if name in ("one rank", "all-gather", "ring", "ulysses"):
                        raise
                    errors[name] = str(error).partition("\n")[0]
        if world.rank == 0:
            show(found, errors, said)
            about = {"command": shlex.join(["-m", "benchmarks.context_parallel", *words]), "torch": torch.__version__}
            device = torch.cuda.get_device_name() if gpu else "cpu"
            if said.out is not None:
                whole = about | {"device": f"{world.size} x {device}", "ms": found, "errors": errors}
                said.out.write_text(json.dumps(whole, indent=1) + "\n")
    return 0


def show(found: dict[str, dict[str, float]], errors: dict[str, str], said: argparse.Namespace) -> None:
    """Times, and the part of the speed of one rank with the same work."""
    kind = "packed" if said.packed else "causal"
    title = f"{said.tokens} tokens a rank, {kind}, {said.heads} heads of {said.dim}, {said.kv_heads} of keys"
    table = Table("way", "forward, ms", "both, ms", "of one rank, forward", "both", title=title, box=None)
    one = found["one rank"]
    for name, ms in found.items():
        both = ms.get("both_ms")
        share = "" if both is None else f"{one['both_ms'] / both:.1%}"
        told = "" if both is None else f"{both:.2f}"
        table.add_row(name, f"{ms['forward_ms']:.2f}", told, f"{one['forward_ms'] / ms['forward_ms']:.1%}", share)
    Console(width=110).print(table)
    for name, why in errors.items():
        print(f"{name}: {why}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
