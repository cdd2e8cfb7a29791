"""What hides a message of tensor parallelism behind a product on two GPUs: NCCL with few or many blocks, copy engines?

    torchrun --nproc-per-node 2 benchmarks/spike_overlap.py [FILE.json]

The layers of Llama-3-8B's width over two ranks, 8192 tokens in bf16, sequence parallel. In the forward a product is cut
into the rows that this rank has, or sends, and the others, and a message passes behind one half; in the backward it
passes behind a weight's gradient. Milliseconds, the slower rank's; "alone" is the product without any message.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm
from torch import Tensor

RANK = int(os.environ["RANK"])
PEER = 1 - RANK
DEVICE = torch.device("cuda", RANK)
S, H = 8192, 4096
HALF = S // 2
MINE, THEIRS = (slice(r * HALF, (r + 1) * HALF) for r in (RANK, PEER))
COLUMN = {"qkv": 3072, "gate and up": 14336}
ROW = {"attention out": 2048, "down": 7168}
found: dict[str, dict[str, float | str]] = {}


def timed(where: str, name: str, run: Callable[[], object], times: int = 40) -> None:
    """Note the milliseconds of a call, or why there are none."""
    try:
        for _ in range(times // 2):
            run()
        torch.cuda.synchronize()
        dist.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            run()
        end.record()
        torch.cuda.synchronize()
        ms = torch.tensor(begin.elapsed_time(end) / times, device=DEVICE)
        dist.all_reduce(ms, dist.ReduceOp.MAX)
        found.setdefault(where, {})[name] = round(ms.item(), 4)
    except Exception as error:  # noqa: BLE001  # a way that does not work here is a finding
        found.setdefault(where, {})[name] = f"{type(error).__name__}: {str(error)[:200]}"


def groups() -> dict[str, dist.ProcessGroup]:
    made = {"nccl": dist.group.WORLD}
    for ctas in (2, 4, 8, 16):
        options = dist.ProcessGroupNCCL.Options()
        options.config.max_ctas = ctas
        made[f"nccl, {ctas} blocks"] = dist.new_group([0, 1], backend="nccl", pg_options=options)
    return made


def zero_ctas() -> dist.ProcessGroup:
    """A communicator that uses copy engines where it can."""
    options = dist.ProcessGroupNCCL.Options()
    options.config.cta_policy = dist.ProcessGroupNCCL.NCCL_CTA_POLICY_ZERO
    group = dist.new_group([0, 1], backend="nccl", pg_options=options)
    dist.all_reduce(torch.zeros(1, device=DEVICE), group=group)
    return group


class Engines:
    """Buffers that the peer can read, and a stream on which copy engines do."""

    def __init__(self, *shape: int) -> None:
        self.own = symm.empty(*shape, dtype=torch.bfloat16, device=DEVICE)
        self.handle = symm.rendezvous(self.own, group=dist.group.WORLD.group_name)
        self.theirs = self.handle.get_buffer(PEER, shape, torch.bfloat16)
        self.stream = torch.cuda.Stream()

    def fetch(self, into: Tensor) -> None:
        """Begin to read what the peer has, when it has it."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.handle.barrier(channel=0)
            into.copy_(self.theirs)
            self.handle.barrier(channel=1)

    def wait(self) -> None:
        torch.cuda.current_stream().wait_stream(self.stream)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=DEVICE)


def column(name: str, n: int, by: dict[str, dist.ProcessGroup]) -> None:
    x, w = rand(HALF, H), rand(n, H).t()
    whole, y = rand(S, H), torch.empty(S, n, dtype=torch.bfloat16, device=DEVICE)
    where = f"gather, {name}"
    timed(where, "alone", lambda: torch.mm(whole, w, out=y))
    timed(
        where,
        "alone, in halves",
        lambda: (torch.mm(whole[MINE], w, out=y[MINE]), torch.mm(whole[THEIRS], w, out=y[THEIRS])),
    )
    for way, group in by.items():

        def first(group: dist.ProcessGroup = group) -> None:
            dist.all_gather_into_tensor(whole, x, group=group)
            torch.mm(whole, w, out=y)

        def behind(group: dist.ProcessGroup = group) -> None:
            work = dist.all_gather_into_tensor(whole, x, group=group, async_op=True)
            torch.mm(x, w, out=y[MINE])
            work.wait()
            torch.mm(whole[THEIRS], w, out=y[THEIRS])

        timed(where, f"message, {way}", lambda group=group: dist.all_gather_into_tensor(whole, x, group=group))
        timed(where, f"one after the other, {way}", first)
        timed(where, f"behind, {way}", behind)
    try:
        engines = Engines(HALF, H)
    except Exception as error:  # noqa: BLE001
        found[where]["copy engines"] = str(error)[:200]
        return

    def by_engines(copy: bool) -> None:
        if copy:
            engines.own.copy_(x)
        engines.fetch(whole[THEIRS])
        torch.mm(engines.own, w, out=y[MINE])
        engines.wait()
        torch.mm(whole[THEIRS], w, out=y[THEIRS])

    timed(where, "message, copy engines", lambda: (engines.fetch(whole[THEIRS]), engines.wait()))
    timed(where, "behind, copy engines, own copied", lambda: by_engines(True))
    timed(where, "behind, copy engines", lambda: by_engines(False))


def row(name: str, k: int, by: dict[str, dist.ProcessGroup]) -> None:
    x, w = rand(S, k), rand(H, k).t()
    y, out, got = rand(S, H), rand(HALF, H), rand(HALF, H)
    where = f"scatter, {name}"
    timed(where, "alone", lambda: torch.mm(x, w, out=y))
    timed(where, "alone, in halves", lambda: (torch.mm(x[MINE], w, out=y[MINE]), torch.mm(x[THEIRS], w, out=y[THEIRS])))
    timed(where, "an addition", lambda: out.add_(got))
    for way, group in by.items():

        def first(group: dist.ProcessGroup = group) -> None:
            torch.mm(x, w, out=y)
            dist.reduce_scatter_tensor(out, y, group=group)

        def behind(group: dist.ProcessGroup = group) -> None:
            torch.mm(x[THEIRS], w, out=y[THEIRS])
            ends = [dist.P2POp(dist.isend, y[THEIRS], group=group, group_peer=PEER)]
            ends.append(dist.P2POp(dist.irecv, got, group=group, group_peer=PEER))
            works = dist.batch_isend_irecv(ends)
            torch.mm(x[MINE], w, out=out)
            for work in works:
                work.wait()
            out.add_(got)

        timed(where, f"message, {way}", lambda group=group: dist.reduce_scatter_tensor(out, y, group=group))
        timed(where, f"one after the other, {way}", first)
        timed(where, f"behind, {way}", behind)
    try:
        engines = Engines(HALF, H)
    except Exception as error:  # noqa: BLE001
        found[where]["copy engines"] = str(error)[:200]
        return

    def by_engines() -> None:
        torch.mm(x[THEIRS], w, out=engines.own)
        engines.fetch(got)
        torch.mm(x[MINE], w, out=out)
        engines.wait()
        out.add_(got)

    timed(where, "behind, copy engines", by_engines)


def backward(name: str, n: int, k: int, by: dict[str, dist.ProcessGroup]) -> None:
    """The weight gradient [n, k] of 8192 tokens, and the gradient of what was gathered, scattered behind it."""
    dy, x = rand(S, n), rand(S, k)
    dx, out = rand(S, H), rand(HALF, H)
    total = torch.zeros(n, k, dtype=torch.float32, device=DEVICE)
    where = f"weight gradient, {name}"

    def product() -> None:
        torch.ops.aten.addmm.dtype_out(total, dy.t(), x, torch.float32, out=total)

    timed(where, "alone", product)
    for way, group in by.items():

        def behind(group: dist.ProcessGroup = group) -> None:
            work = dist.reduce_scatter_tensor(out, dx, group=group, async_op=True)
            product()
            work.wait()

        timed(where, f"behind, {way}", behind)


def zero(name: str, n: int) -> None:
    where = f"gather, {name}"
    try:
        group = zero_ctas()
        symm.set_backend("NCCL")
        x, w = rand(HALF, H), rand(n, H).t()
        whole = symm.empty(S, H, dtype=torch.bfloat16, device=DEVICE)
        symm.rendezvous(whole, group=group.group_name)
        y = torch.empty(S, n, dtype=torch.bfloat16, device=DEVICE)
    except Exception as error:  # noqa: BLE001
        found.setdefault(where, {})["nccl, no blocks"] = f"{type(error).__name__}: {str(error)[:200]}"
        return

    def behind() -> None:
        work = dist.all_gather_into_tensor(whole, x, group=group, async_op=True)
        torch.mm(x, w, out=y[MINE])
        work.wait()
        torch.mm(whole[THEIRS], w, out=y[THEIRS])

    timed(where, "message, nccl, no blocks", lambda: dist.all_gather_into_tensor(whole, x, group=group))
    timed(where, "behind, nccl, no blocks", behind)


def main() -> None:
    torch.cuda.set_device(DEVICE)
    dist.init_process_group("nccl", device_id=DEVICE)
    by = groups()
    for name, n in COLUMN.items():
        column(name, n, by)
    for name, k in ROW.items():
        row(name, k, by)
    for name, (n, k) in {"qkv": (3072, H), "attention out": (H, 2048), "gate and up": (14336, H)}.items():
        backward(name, n, k, by)
    for name, n in COLUMN.items():
        zero(name, n)
    if RANK == 0:
        for where, rows in found.items():
            print(where)
            for name, ms in rows.items():
                print(f"    {name:45} {ms}")
        for file in sys.argv[1:]:
            Path(file).write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
