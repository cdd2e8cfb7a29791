"""How should two pipeline ranks exchange messages: one by one, in batches, or with a communicator for each way?

    torchrun --nproc-per-node 2 benchmarks/spike_p2p.py            # NCCL where there are two GPUs, else Gloo

Prints a table of one exchange (a message each way) under each design, the step time of a two-stage 1F1B
pipeline beside that of its computation alone, and whether it survives both ranks sending first. The last
question hangs some designs, so it comes last, is given 10 s each, and the process then leaves without clean-up.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stretto.pipeline_parallel import Executor, Link, OwnWeights, Stage, TensorMeta
from stretto.schedule import lower, one_f_one_b
from stretto.world import Axis

RANK, LOCAL = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
PEER = 1 - RANK
CUDA = torch.cuda.device_count() >= 2
DEVICE = torch.device("cuda", LOCAL) if CUDA else torch.device("cpu")
MIB = 2**20


@dataclass(frozen=True)
class Design:
    """`down` carries messages from rank 0 to rank 1, `up` the other way."""

    name: str
    down: dist.ProcessGroup
    up: dist.ProcessGroup
    batched: bool = False

    def start(self, x: Tensor, y: Tensor, send_first: bool) -> list[dist.Work]:
        """Begin to send x and to receive y."""
        out, back = (self.down, self.up) if RANK == 0 else (self.up, self.down)
        if self.batched:
            send = dist.P2POp(dist.isend, x, group=out, group_peer=PEER)
            recv = dist.P2POp(dist.irecv, y, group=back, group_peer=PEER)
            return dist.batch_isend_irecv([send, recv])
        both: list[Callable[[], dist.Work | None]] = [
            lambda: dist.isend(x, group=out, group_dst=PEER),
            lambda: dist.irecv(y, group=back, group_src=PEER),
        ]
        return [work for start in (both if send_first else both[::-1]) if (work := start()) is not None]


def sync() -> None:
    if CUDA:
        torch.cuda.synchronize()


def timed(run: Callable[[], None], times: int) -> float:
    """Seconds a call, the slower rank's; the best of three rounds."""
    run()
    best = float("inf")
    for _ in range(3):
        dist.barrier()
        sync()
        begin = time.perf_counter()
        for _ in range(times):
            run()
        sync()
        took = torch.tensor((time.perf_counter() - begin) / times, device=DEVICE)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        best = min(best, took.item())
    return best


def say(text: str) -> None:
    if RANK == 0:
        print(text, flush=True)


def exchange(design: Design, size: int) -> float:
    """Rank 0 sends first and rank 1 receives first: the mirrored order that lowering gives."""
    x, y = torch.ones(size, dtype=torch.uint8, device=DEVICE), torch.empty(size, dtype=torch.uint8, device=DEVICE)

    def once() -> None:
        for work in design.start(x, y, send_first=RANK == 0):
            work.wait()

    return timed(once, 200 if size < MIB else 10)


class Layers(nn.Module):
    """Square GEMMs; the last stage ends in a scalar."""

    def __init__(self, width: int, depth: int, dtype: torch.dtype) -> None:
        super().__init__()
        made = (nn.Linear(width, width, bias=False, dtype=dtype, device=DEVICE) for _ in range(depth))
        self.layers = nn.Sequential(*made)

    def forward(self, x: Tensor | None, microbatch: Tensor) -> Tensor:
        y: Tensor = self.layers(microbatch if x is None else x)
        return y.float().sum() if RANK == 1 else y


def pipeline(design: Design, m: int, rows: int, width: int, depth: int) -> tuple[float, float]:
    """(seconds a step, seconds a microbatch takes to compute on one rank: forward and backward)."""
    dtype = torch.bfloat16 if CUDA else torch.float32
    stage = Stage(RANK, Layers(width, depth, dtype), TensorMeta((rows, width), dtype) if RANK else None)
    link = Link(Axis("pp", RANK, (0, 1), design.down), DEVICE, {(1, 0): Axis("up", RANK, (0, 1), design.up)})
    executor = Executor(lower(one_f_one_b(2, m)), RANK, {RANK: stage}, link, OwnWeights())
    x = torch.randn(rows, width, dtype=dtype, device=DEVICE)

    def alone() -> None:
        stage.backward(0, torch.ones_like(y) if (y := stage.forward(0, x if RANK else None, x)).dim() else None)

    return timed(lambda: (executor.step([x] * m), None)[1], 3), timed(alone, 3)


def survives(design: Design, size: int) -> bool:
    """Whether both ranks may send first; after a failure this process cannot go on with the design."""
    x, y = torch.ones(size, dtype=torch.uint8, device=DEVICE), torch.empty(size, dtype=torch.uint8, device=DEVICE)
    works = design.start(x, y, send_first=True)
    if not CUDA:
        for work in works:
            work.wait()
        return True
    until = time.monotonic() + 10
    while time.monotonic() < until and not all(work.is_completed() for work in works):
        time.sleep(0.01)
    return all(work.is_completed() for work in works)


def main() -> None:
    if CUDA:
        torch.cuda.set_device(DEVICE)
    else:
        torch.set_num_threads(1)
    # No device is bound to the default group, so that a group of its own is either bound or not.
    dist.init_process_group("nccl" if CUDA else "gloo")
    a, b = dist.new_group([0, 1]), dist.new_group([0, 1])
    designs = [Design("one by one", a, a), Design("batched", a, a, batched=True), Design("a way each", a, b)]
    if CUDA:
        bound = dist.new_group([0, 1], device_id=DEVICE)
        designs.insert(1, Design("one by one, device bound", bound, bound))
        designs.append(Design("a way each, device bound", bound, dist.new_group([0, 1], device_id=DEVICE)))

    say(f"torch {torch.__version__}, {torch.cuda.get_device_name() if CUDA else 'Gloo on CPU'}\n")
    sizes = [1024, MIB, 32 * MIB, *([256 * MIB] if CUDA else [])]
    say("exchange of a message each way".ljust(34) + "".join(f"{size // 1024:>16,} KiB" for size in sizes))
    for design in designs:
        took = [exchange(design, size) for size in sizes]
        cells = (f"{1e6 * t:>9.0f} us {2 * size / t / 1e9:>5.1f}GB/s" for t, size in zip(took, sizes, strict=True))
        say(design.name.ljust(34) + "".join(f"{cell:>20}" for cell in cells))

    m, rows, width, depth = (16, 8192, 8192, 2) if CUDA else (8, 512, 1024, 4)
    say(f"\n1F1B, 2 stages, {m} microbatches, messages {rows * width * (2 if CUDA else 4) / MIB:.0f} MiB")
    for design in designs:
        if not design.batched:
            step, alone = pipeline(design, m, rows, width, depth)
            ideal = (m + 1) * alone
            say(f"{design.name.ljust(34)}step {1e3 * step:8.2f} ms, computation and bubble {1e3 * ideal:8.2f} ms"
                f", exposed {100 * (step / ideal - 1):5.1f} %")  # fmt: skip

    say(f"\nboth ranks send first ({64 if CUDA else 32} MiB)")
    for design in sorted(designs, key=lambda d: d.down is d.up and not d.batched):
        good = survives(design, (64 if CUDA else 32) * MIB)
        say(f"{design.name.ljust(34)}{'passes' if good else 'HANGS'}")
    sys.stdout.flush()
    os._exit(0)  # a communicator that hangs cannot be destroyed


if __name__ == "__main__":
    main()
