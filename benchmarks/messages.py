"""What a message of tensor parallelism costs beside a product: through NCCL, and through the copy engines.

    torchrun --nproc-per-node 2 -m benchmarks.messages

The shapes of D4 over two GPUs, sequence parallel. Milliseconds of the device, of one call among many, and what the
host spends on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.train.shapes import SHAPES
from stretto.collectives import all_gather_async, reduce_scatter_async
from stretto.initialize import initialize
from stretto.layout import Layout
from stretto.parallel_state import GroupOptions, ParallelState
from stretto.tensor_parallel.linear import accumulate_matmul
from stretto.tensor_parallel.overlap import gathered, scattered
from stretto.world import Axis, World

SHAPE = SHAPES["D4"]
TIMES = 30


def timed(name: str, run: Callable[[], object], world: World) -> None:
    for _ in range(TIMES // 3):
        run()
    torch.cuda.synchronize()
    dist.barrier()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    host = time.perf_counter()
    begin.record()
    for _ in range(TIMES):
        run()
    host = (time.perf_counter() - host) / TIMES * 1e3
    end.record()
    torch.cuda.synchronize()
    if world.rank == 0:
        print(f"{name:55} {begin.elapsed_time(end) / TIMES:8.3f}   host {host:.3f}", flush=True)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def behind(product: Callable[[], object], begin: Callable[[Tensor, Axis], object], x: Tensor, axis: Axis) -> None:
    message = begin(x, axis)
    product()
    message.wait()  # type: ignore[attr-defined]


def measure(world: World, tp: Axis) -> None:
    tokens, h = SHAPE.micro_batch * SHAPE.seq_len, SHAPE.hidden
    part, whole = drawn(tokens // tp.size, 1, h), drawn(tokens, 1, h)
    ways = {"copy engines": tp, "NCCL": replace(tp, peer_buffer=None)}
    for way, axis in ways.items():
        timed(f"gather, {way}", lambda axis=axis: all_gather_async(part, axis).wait(), world)  # type: ignore[misc]
        timed(f"scatter, {way}", lambda axis=axis: reduce_scatter_async(whole, axis).wait(), world)  # type: ignore[misc]
    for name in ("qkv", "ffn in"):
        d_out = SHAPE.matrices[name][1] // tp.size
        w, dy, total = drawn(d_out, h), drawn(tokens, d_out), torch.zeros(d_out, h, device="cuda")
        flat = whole.view(tokens, h)
        timed(f"{name}, product alone", lambda: torch.mm(flat, w.t()), world)  # noqa: B023
        timed(f"{name}, gathered behind a half of it", lambda: gathered(part, w, None, tp), world)  # noqa: B023
        timed(
            f"{name}, gathered by NCCL first",
            lambda: torch.mm(all_gather_async(part, ways["NCCL"]).wait().view(tokens, h), w.t()),  # noqa: B023
            world,
        )

        def gradient(total: Tensor = total, dy: Tensor = dy, flat: Tensor = flat) -> None:
            accumulate_matmul(total, False, dy, flat)

        timed(f"{name}, weight gradient alone", gradient, world)
        for way, axis in ways.items():
            timed(
                f"{name}, a scatter behind it, {way}",
                lambda axis=axis, g=gradient: behind(g, reduce_scatter_async, whole, axis),  # type: ignore[misc]
                world,
            )
    for name in ("attention out", "ffn out"):
        d_in = SHAPE.matrices[name][0] // tp.size
        w, x = drawn(h, d_in), drawn(tokens, 1, d_in)
        timed(f"{name}, product alone", lambda: torch.mm(x.view(tokens, d_in), w.t()), world)  # noqa: B023
        timed(f"{name}, scattered behind a half of it", lambda: scattered(x, w, tp), world)  # noqa: B023
        timed(
            f"{name}, scattered by NCCL after it",
            lambda: reduce_scatter_async(
                torch.mm(x.view(tokens, d_in), w.t()).view(tokens, 1, h),  # noqa: B023
                ways["NCCL"],
            ).wait(),
            world,
        )


def main() -> None:
    with initialize(device="cuda") as world:
        size = SHAPE.micro_batch * SHAPE.seq_len * SHAPE.hidden * 2 // world.size
        layout, along_tp = Layout.of(tp=world.size), ("tp", "tp-pp", "tp-cp-dp-pp")
        options = dict.fromkeys(along_tp, GroupOptions(peer_buffer=size))
        with ParallelState.build(layout, world, timeout=60, options=options) as state:
            measure(world, state.axis("tp"))


if __name__ == "__main__":
    main()
