"""How fast is a layer of experts, beside its GEMMs as dense ones and beside plain PyTorch, and where does the rest go?

    python -m benchmarks.experts [--presets olmoe-7b,qwen3-30b-a3b] [--tokens 16384] [--seconds 0.5] [--out FILE.json]
    python -m benchmarks.experts --profile [--peers stretto]        the kernels of a forward and backward

Forward and backward of `stretto.experts`' layer as the model has it: router, sort, grouped GEMMs, weight gradients
added up in fp32, combination. The limit is the time of the same operations in dense GEMMs of all rows, measured in the
same run without a pause. Routing is balanced (each expert gets as many rows) or uneven (tokens that are alike, as those
of a real model are). Memory is what comes beyond what was there: ours has its fp32 sums beforehand. Errors are in the
2-norm, beside ours. Peers are in `benchmarks.expert_peers`.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.expert_peers import PEERS, Layer, made
from benchmarks.train.measure import sustained, synchronize
from stretto.arguments import parse
from stretto.arguments.schema import ModelConfig

ROUTINGS = ("balanced", "uneven")
PROFILED = 5


@dataclass(frozen=True)
class Case:
    """A layer's shape, its tokens [n, h], the gradient of its output, and its router's weight [E, h]."""

    config: ModelConfig
    x: Tensor
    dy: Tensor
    router: Tensor

    @classmethod
    def of(cls, config: ModelConfig, tokens: int, routing: str, device: torch.device) -> Case:
        """Tokens that the router sends where they are to go: no peer is told anything."""
        torch.manual_seed(0)
        e, h, k = config.experts, config.hidden, config.top_k
        x = torch.randn(tokens, h, device=device)
        router = torch.randn(e, h, device=device) * config.init_std
        if routing == "balanced":
            ones = torch.arange(tokens * k, device=device).view(tokens, k) % e
            towards = torch.zeros(tokens, e, device=device).scatter_(1, ones[torch.randperm(tokens, device=device)], 1)
            router = torch.linalg.qr(router.t())[0].t() * router.norm(dim=1, keepdim=True)
            x += towards @ (12 * router / router.norm(dim=1, keepdim=True))
        else:
            x += 0.5 * torch.randn(h, device=device)
        low = {"device": device, "dtype": torch.bfloat16}
        return cls(config, x.to(**low), torch.randn(tokens, h, **low), router.to(**low))

    @property
    def load(self) -> float:
        """The largest count of an expert over the mean."""
        chosen = (self.x.float() @ self.router.float().t()).topk(self.config.top_k).indices
        counts = torch.bincount(chosen.flatten(), minlength=self.config.experts).double()
        return float(counts.max() / counts.mean())

    @property
    def flops(self) -> float:
        """Of forward and backward of the experts' matrices."""
        return 6.0 * len(self.x) * self.config.top_k * self.config.hidden * 3 * self.config.dim_expert


def limit(case: Case, seconds: float) -> float:
    """Milliseconds of the experts' GEMMs, forward and back, as dense ones over the rows of all experts."""
    c, like = case.config, {"device": case.x.device, "dtype": torch.bfloat16}
    rows, h, f = len(case.x) * c.top_k, c.hidden, c.dim_expert
    pairs = [
        (torch.randn(rows, i, **like), torch.randn(rows, o, **like), torch.randn(o, i, **like))
        for i, o in ((h, 2 * f), (f, h))
    ]

    def run() -> None:
        for x, dy, w in pairs:
            torch.mm(x, w.t())
            torch.mm(dy, w)
            torch.mm(dy.t(), x)

    return sustained(run, case.x.device, seconds=seconds)


def errors(layer: Layer, case: Case, truth: dict[str, Tensor]) -> dict[str, float]:
    """How far output and gradients of one peer are from `truth`, in the 2-norm; the first peer gives it."""
    x = case.x.detach().requires_grad_()
    layer.begin()
    y = layer.forward(x)
    y.backward(case.dy)
    assert x.grad is not None
    found = {}
    for name, value in {"y": y.detach(), "dx": x.grad, **layer.gradients()}.items():
        true = truth.setdefault(name, value.clone()).float()
        found[name] = float((value.float() - true).norm() / true.norm())
    return found


def measured(layer: Layer, case: Case, seconds: float) -> dict[str, Any]:
    """One peer: milliseconds and memory."""
    device, gpu = case.x.device, case.x.is_cuda
    x, found = case.x.detach().requires_grad_(), dict[str, Any]()

    def step() -> None:
        x.grad = None
        layer.begin()
        layer.forward(x).backward(case.dy)

    layer.begin()
    x.grad = None
    if gpu:
        before = torch.cuda.memory_allocated()
        y = layer.forward(x)
        found["saved_bytes"] = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        y.backward(case.dy)
        found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        del y
    forward = sustained(lambda: _unused(layer.forward, x), device, seconds=seconds / 2)
    found |= {"ms": sustained(step, device, seconds=seconds), "forward_ms": forward}
    return found


def _unused(forward: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """A forward that saves what a backward needs, and lets it go."""
    forward(x)


def profiled(layer: Layer, case: Case, console: Console, title: str) -> list[dict[str, Any]]:
    """Kernels by their own time, the longest first; milliseconds of one forward and backward."""
    x = case.x.detach().requires_grad_()

    def step() -> None:
        x.grad = None
        layer.begin()
        layer.forward(x).backward(case.dy)

    for _ in range(3):
        step()
    synchronize(x.device)
    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if x.is_cuda else [ProfilerActivity.CPU]
    with profile(activities=kinds) as found:
        for _ in range(PROFILED):
            step()
        synchronize(x.device)
    total: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in found.events() or ():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if x.is_cuda != on_gpu or event.is_user_annotation:
            continue
        one = total[event.name]
        one[0] += (event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total) * 1e-3 / PROFILED
        one[1] += 1
    whole = sum(ms for ms, _ in total.values())
    rows: list[dict[str, Any]] = [
        {"kernel": name, "ms": ms, "calls": count / PROFILED}
        for name, (ms, count) in sorted(total.items(), key=lambda item: -item[1][0])
    ]
    table = Table("kernel", "ms", "share", "calls", title=f"{title}: {whole:.3f} ms of kernels")
    for row in rows[:15]:
        table.add_row(row["kernel"][:90], f"{row['ms']:.3f}", f"{row['ms'] / whole:.1%}", f"{row['calls']:g}")
    console.print(table)
    return rows[:30]


def show(name: str, found: dict[str, Any], console: Console) -> None:
    columns = ("ms", "forward", "share of limit", "TFLOP/s", "saved MiB", "peak MiB", "largest error")
    title = f"{name}, load max/mean {found['load']:.2f}; dense GEMMs {found['limit_ms']:.3f} ms"
    table = Table("", *columns, title=f"{title}, {found['flops'] / found['limit_ms'] * 1e-9:.0f} TFLOP/s")
    for peer, row in found["peers"].items():
        if "failed" in row:
            table.add_row(f"{peer}: {row['failed']:.60}")
            continue
        memory = [f"{row[key] / 2**20:,.0f}" if key in row else "" for key in ("saved_bytes", "peak_bytes")]
        rates = f"{found['limit_ms'] / row['ms']:.1%}", f"{found['flops'] / row['ms'] * 1e-9:.0f}"
        worst, apart = max(row["errors"].items(), key=lambda item: item[1])
        table.add_row(peer, f"{row['ms']:.3f}", f"{row['forward_ms']:.3f}", *rates, *memory, f"{apart:.4f} {worst}")
    console.print(table)


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts")
    parser.add_argument("--presets", default="olmoe-7b,qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--routings", default=",".join(ROUTINGS))
    parser.add_argument("--peers", default=",".join(PEERS), help=f"of {', '.join(PEERS)}")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement")
    parser.add_argument("--profile", action="store_true", help="print the kernels of these peers, and measure nothing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="hidden 128, a trial of the benchmark")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("python -m benchmarks.experts: torch sees no GPU")
    device, console = torch.device(options.device), Console(width=140)
    found: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.experts", *argv]),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else f"CPU {platform.machine()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "tokens": options.tokens,
        "cases": {},
    }
    began = time.monotonic()
    for preset in options.presets.split(","):
        config = parse(["--preset", preset], env={}, files=False).args.model
        # Losses that keep a balance would give ours gradients that the others lack; what they read is read.
        config = replace(config, balance_loss=0.0, router_z_loss=0.0)
        config = replace(config, hidden=128, expert_ffn=64) if options.small else config
        for routing in options.routings.split(","):
            name, case = f"{preset} {routing}", Case.of(config, options.tokens, routing, device)
            one: dict[str, Any] = {"load": case.load, "flops": case.flops, "peers": {}}
            found["cases"][name], truth = one, dict[str, Tensor]()
            if not options.profile:
                one["limit_ms"] = limit(case, options.seconds)
            for peer in options.peers.split(","):
                layer: Layer | None = None
                try:
                    layer = made(peer, config, case.router, len(case.x))
                    if options.profile:
                        one["peers"][peer] = {"kernels": profiled(layer, case, console, f"{name}, {peer}")}
                    else:
                        apart = errors(layer, case, truth)
                        one["peers"][peer] = {"errors": apart, **measured(layer, case, options.seconds)}
                except Exception as error:  # noqa: BLE001  # of any kind: the others go on
                    one["peers"][peer] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]:.200}"}
                    print(f"{name}, {peer}: {one['peers'][peer]['failed']}", flush=True)
                else:
                    print(f"[{time.monotonic() - began:5.1f} s] {name}, {peer}: done", flush=True)
                layer = None  # before memory is given back
                if options.device == "cuda":
                    torch.cuda.empty_cache()
                if options.out:
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    options.out.write_text(json.dumps(found, indent=1) + "\n")
            if not options.profile:
                show(name, one, console)
    print(f"{time.monotonic() - began:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
