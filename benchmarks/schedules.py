"""How fast schedules are made, and whether a real step takes as long as a simulated one.

    python -m benchmarks.schedules make              # 64 ranks x 4 stages, 1,024 microbatches, beside torch's own
    python -m benchmarks.schedules run               # sleeps as computation, on 4 processes over Gloo

`make` times what each library needs before the first step: the order, its check, and the messages and gathers between
the computations. `run` compares each schedule's step with `simulate`, and the bubble of the sleeping ranks.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stretto.deferred import Deferred
from stretto.exchange import all_gather_json
from stretto.initialize import initialize
from stretto.launch.local import run_local
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.pipeline_parallel import Executor, Link, OwnWeights, Stage, TensorMeta
from stretto.schedule import FSDP, GENERATORS, Action, Cost, Span, check, lower, makespan, schedule_for, simulate
from stretto.schedule.measured import Measured
from stretto.schedule.picture import idle
from stretto.world import World


def make(p: int, v: int, m: int, beside: bool) -> int:
    """Print seconds of each pass, ours and torch's: of the processor, which others may share."""
    begin = time.process_time()
    s = schedule_for("interleaved", p, m, v)
    made = time.process_time()
    check(s)
    checked = time.process_time()
    program = lower(s, FSDP)
    end = time.process_time()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"interleaved, {p} ranks x {v} stages, {m} microbatches: {s.num_actions:,} computations")
    print(
        f"stretto: order {made - begin:.2f} s, check {checked - made:.2f} s, lower to {program.num_actions:,} actions "
        f"{end - checked:.2f} s; {end - begin:.2f} s, {memory:.2f} GiB of the process"
    )
    if beside:
        torch_order(p, v, m)
    return 0


def torch_order(p: int, v: int, m: int) -> None:
    """The functions behind torch's ScheduleInterleaved1F1B and its runtime, in its order of calls."""
    from torch.distributed.pipelining import schedules as theirs

    begin = time.process_time()
    order = {}
    for rank in range(p):
        warmup = min((v - 1) * p + 2 * (p - 1 - rank), m * v)

        def forward(step: int, rank: int = rank) -> int:
            return step // p % v * p + rank

        def backward(step: int, rank: int = rank, warmup: int = warmup) -> int:
            return (v - 1 - (step - warmup) // p % v) * p + rank

        rest = m * v - warmup
        order[rank] = theirs._get_1f1b_rank_ops(v, p, warmup, rest, m * v - rest, rank, forward, backward)
    made = time.process_time()
    print(f"torch {torch.__version__}: order {made - begin:.2f} s", flush=True)
    plain = {rank: [a for a in actions if a is not None] for rank, actions in order.items()}
    gathered = {rank: theirs._add_unshard_reshard(actions) for rank, actions in plain.items()}
    unsharded = time.process_time()
    print(f"torch: gathers {unsharded - made:.2f} s", flush=True)
    theirs._add_send_recv(gathered, lambda stage: stage % p, p * v)
    print(f"torch: messages {time.process_time() - unsharded:.2f} s; {time.process_time() - begin:.2f} s in all")


class Sleep(torch.autograd.Function):
    """Takes `times` seconds for F, I and W, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, times: tuple[float, float, float], deferred: Deferred) -> Tensor:
        time.sleep(times[0])
        ctx.save_for_backward(weight)
        ctx.times, ctx.deferred = times, deferred
        return x + 0.0

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        time.sleep(ctx.times[1])
        (weight,) = ctx.saved_tensors

        def wgrad() -> Tensor:
            time.sleep(ctx.times[2])
            return torch.zeros_like(weight)

        return dy, ctx.deferred.gradient(weight, wgrad), None, None


class Sleeper(nn.Module):
    def __init__(self, times: tuple[float, float, float], last: bool, deferred: Deferred) -> None:
        super().__init__()
        self.weight, self.times = nn.Parameter(torch.zeros(1)), times
        self.last, self.deferred = last, deferred

    def forward(self, x: Tensor | None, _: Any) -> Tensor:
        x = torch.zeros(1, requires_grad=True) if x is None else x
        y: Tensor = Sleep.apply(x, self.weight, self.times, self.deferred)
        return y.sum() if self.last else y


@dataclass(frozen=True)
class Row:
    """Seconds of a step of one schedule: as it ran, as simulated from the sleeps, and from the step's own profile."""

    name: str
    measured: float
    simulated: float
    profiled: float
    bubbles: list[float]
    """Of each rank, as it ran."""

    @property
    def error(self) -> float:
        return self.simulated / self.measured - 1


def sleeping(world: World, name: str, p: int, m: int, unit: float, hop: float, *, head: float = 1.0) -> Row:
    """The best of three steps; all layers of a rank take `unit` seconds forward and back for the input, W 0.7 of it."""
    with ParallelState.build(Layout.of(pp=p), world) as state:
        axis = state.axis("pp")
        s = schedule_for(name, p, m)
        f = [unit * p / s.num_stages] * s.num_stages
        f[-1] *= head
        cost = Cost.split(tuple(f), tuple(f), tuple(0.7 * x for x in f), hop=hop)
        deferred, boundary = Deferred(), TensorMeta((1,), torch.float32)
        stages = {
            k: Stage(
                k, Sleeper((f[k], f[k], 0.7 * f[k]), k == s.num_stages - 1, deferred), boundary if k else None, deferred
            )
            for k, rank in enumerate(s.placement)
            if rank == axis.rank
        }
        executor = Executor(lower(s, cost=cost), axis.rank, stages, Link(axis, world.device), OwnWeights())
        executor.step([None] * m)  # announces every message
        executor.clock.start()
        for _ in range(3):
            dist.barrier(axis.group)
            executor.step([None] * m)
        own = [[[str(x.action), x.start, x.end] for x in step] for step in executor.clock.stop()]
        told = all_gather_json(own, axis)
        steps = [
            [Span(rank, Action.parse(a), start, end) for rank, ranks in enumerate(told) for a, start, end in ranks[n]]
            for n in range(3)
        ]
        ran = Measured.of(s, steps, hop)
        best = min(ran.steps, key=makespan)
        return Row(name, makespan(best), makespan(simulate(s, cost)), makespan(simulate(s, ran.cost())), idle(best))


def message_seconds(world: World, p: int, times: int = 50) -> float:
    """The way of a message to a process that waits for it, and back, halved: the median between ranks 0 and 1."""
    with ParallelState.build(Layout.of(pp=p), world) as state:
        link, x, taken = Link(state.axis("pp"), world.device), torch.zeros(1), []
        for _ in range(times):
            begin = time.perf_counter()
            if world.rank == 0:
                link.send(x, 1)
                link.recv(TensorMeta((1,), torch.float32), 1).wait()
            elif world.rank == 1:
                link.recv(TensorMeta((1,), torch.float32), 0).wait()
                link.send(x, 0)
            taken.append((time.perf_counter() - begin) / 2)
        link.drain()
        median = torch.tensor(sorted(taken)[times // 2])
        dist.broadcast(median, 0, group=state.axis("pp").group)
        return float(median)


def measure(names: list[str], p: int, m: int, unit: float, out: Path | None) -> int:
    with initialize(device="cpu") as world:
        hop = message_seconds(world, p)
        rows = []
        for name in names:
            rows.append(row := sleeping(world, name, p, m, unit, hop))
            if world.rank == 0:
                print(f"{name:15} {row.measured:.3f} s, simulated {row.simulated:.3f} s ({row.error:+.1%})", flush=True)
        if world.rank == 0:
            said = table(rows, p, m, unit, hop)
            print(said)
            if out is not None:
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(said, encoding="utf-8")
    return 0


def table(rows: Sequence[Row], p: int, m: int, unit: float, hop: float) -> str:
    lines = [
        f"Sleeps as computation over Gloo: {p} ranks, {m} microbatches, {1e3 * unit:g} ms for a forward of all layers "
        f"of a rank, as much for the input gradient, 0.7 of it for the weights'; a message takes {1e3 * hop:.2f} ms; "
        f"load of the machine {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores. Simulated: from the sleeps and "
        "the message; profiled: from what each stage took.",
        "",
        "| schedule | measured, s | simulated, s | error | from the profile, s | error | bubble of each rank |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{r.name}` | {r.measured:.3f} | {r.simulated:.3f} | {r.error:+.1%} | {r.profiled:.3f} | "
        f"{r.profiled / r.measured - 1:+.1%} | {' '.join(f'{b:.1%}' for b in r.bubbles)} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "run"])
    parser.add_argument("--pp", type=int)
    parser.add_argument("--vpp", type=int, default=4)
    parser.add_argument("--microbatches", type=int)
    parser.add_argument("--unit", type=float, default=0.04, help="seconds of a forward of all layers of a rank")
    parser.add_argument("--alone", action="store_true", help="make: without torch beside")
    parser.add_argument("--schedules", nargs="*", help="run: these names (all)")
    parser.add_argument("--out", type=Path, help="run: also writes the table there")
    said = parser.parse_args()
    if said.what == "make":
        return make(said.pp or 64, said.vpp, said.microbatches or 1024, not said.alone)
    p, names = said.pp or 4, said.schedules or list(GENERATORS)
    work: Callable[[], int] = partial(measure, names, p, said.microbatches or 8, said.unit, said.out)
    return run_local(p, work)


if __name__ == "__main__":
    raise SystemExit(main())
