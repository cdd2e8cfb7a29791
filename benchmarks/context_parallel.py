"""Attention over cp: every way of ours, a plain ring and torch's own, against one rank with the same work for each.

    torchrun --nproc-per-node 2 -m benchmarks.context_parallel [--tokens 8192,65536] [--rows causal,packed]
        [--ways all|ours|torch] [--calls 10] [--kernels] [--no-autotune] [--device cuda] [--out FILE.json]

`--tokens` are those of a rank. Each way is told and saved as it is measured, so a run that is cut has what came before.
A time is the median of its calls. There are two references for speed: one rank with as much work as each has over cp,
and the whole row on one rank, its time divided by the ranks. The plain ring is the textbook's (Liu et al., 2023; Zhu,
"ring-flash-attention", 2024): one block of keys after another, all transfers waited for, each block's output merged in
the dtype of the run. torch's own are those of `benchmarks.context_torch`. Output and gradients of each way are held
against one process that has the whole row: what is further from them than the dtype rounds is no result.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.context_torch import torchs
from benchmarks.context_ways import OURS, REFERENCES, Case, Way, alone, ours
from stretto import Layout, ParallelState, initialize
from stretto.attention import PLAIN
from stretto.collectives import all_reduce
from stretto.parallel_state import GroupOptions
from stretto.world import Axis, World

FAR = {torch.bfloat16: 0.02, torch.float32: 1e-5}
"""Distances in the 2-norm, as a share of the whole, that are no rounding."""


WARM = 2
"""Calls before those that count."""


def timed(call: Callable[[], object], device: torch.device, calls: int) -> float:
    """Median seconds of so many calls, one behind the other, the same number on all ranks."""
    gpu = device.type == "cuda"
    for _ in range(WARM):
        call()
    if gpu:
        torch.cuda.synchronize()
    marks: list[float | torch.cuda.Event] = []
    for n in range(calls + 1):
        if n:
            call()
        marks.append(_mark() if gpu else time.perf_counter())
    if gpu:
        torch.cuda.synchronize()
    return median(_between(a, b) for a, b in pairwise(marks))


def _mark() -> torch.cuda.Event:
    mark = torch.cuda.Event(enable_timing=True)
    mark.record()  # type: ignore[no-untyped-call]
    return mark


def _between(a: float | torch.cuda.Event, b: float | torch.cuda.Event) -> float:
    if isinstance(a, float) or isinstance(b, float):
        return float(b) - float(a)  # type: ignore[arg-type]
    return float(a.elapsed_time(b)) / 1e3  # type: ignore[no-untyped-call]


def kernels_of(call: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of one call by kernel, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    times = {each.key[:90]: each.self_device_time_total / 1e3 for each in found.key_averages()}
    return {name: ms for name, ms in sorted(times.items(), key=lambda at: -at[1])[:16] if ms > 0}


class Truth:
    """Random q, k, v and a gradient of a whole row, and what one process makes of them."""

    def __init__(self, case: Case, cp: Axis, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(1)
        length = case.tokens * cp.size
        shapes = [(1, heads, length, case.dim) for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)]
        *self.inputs, self.dy = (torch.randn(s, generator=generator, device=device, dtype=dtype) for s in shapes)
        self.cp, self.dtype = cp, dtype
        attend, structure = alone(case, cp.rank, device, length)
        inputs = [x.clone().requires_grad_() for x in self.inputs]
        y = attend(*inputs, PLAIN, structure)
        y.backward(self.dy)
        self.found = [y.detach(), *(x.grad for x in inputs)]

    def own(self, way: Way) -> list[Tensor]:
        """This rank's q, k and v; the first tokens, as many as `way` has, where it has no places."""
        at = slice(0, way.tokens) if way.places is None else way.places
        return [x[:, :, at].contiguous().requires_grad_(way.backward) for x in self.inputs]

    def gradient(self, way: Way) -> Tensor:
        """That of this rank's output, likewise."""
        return self.dy[:, :, slice(0, way.tokens) if way.places is None else way.places].contiguous()

    def apart(self, way: Way) -> float:
        """The largest distance of output and gradients of a way, in the 2-norm, over all ranks."""
        assert way.places is not None
        q, k, v = self.own(way)
        y = way.attend(q, k, v, PLAIN, way.structure)
        found: list[Tensor | None] = [y.detach()]
        if way.backward:
            y.backward(self.dy[:, :, way.places])
            found += [x.grad for x in (q, k, v)]
        apart = []
        for x, true in zip(found, self.found, strict=False):
            assert x is not None
            assert true is not None
            part = true[:, :, way.places].float()
            sums = torch.stack([(x.float() - part).square().sum(), part.square().sum()]).double()
            error, size = all_reduce(sums, self.cp).tolist()
            apart.append((error / size) ** 0.5)
        return max(apart) if all(x == x for x in apart) else float("nan")


def measured(make: Callable[[], Way], truth: Truth, calls: int, *, kernels: bool = False) -> dict[str, Any]:
    """Milliseconds of a forward, and of both; how far it is from one process; what kernels both take."""
    way = make()
    with way.around():
        found: dict[str, Any] = {} if way.places is None else {"apart": truth.apart(way)}
        q, k, v = truth.own(way)
        dy = truth.gradient(way)

        def both() -> None:
            torch.autograd.grad(way.attend(q, k, v, PLAIN, way.structure), (q, k, v), dy)

        with torch.no_grad():
            one = timed(lambda: way.attend(q, k, v, PLAIN, way.structure), q.device, calls)
        found["forward_ms"] = 1e3 * way.work * one
        if way.backward:
            found["both_ms"] = 1e3 * way.work * timed(both, q.device, calls)
            if kernels:
                found["kernels_ms"] = kernels_of(both)
    return found


class Results:
    """What was found of each case, by way; and why there is nothing of some. Told and kept as it comes, on rank 0."""

    def __init__(self, about: dict[str, str], out: Path | None, *, tells: bool) -> None:
        self.cases: dict[str, dict[str, dict[str, Any]]] = {}
        self.errors: dict[str, dict[str, str]] = {}
        self._about, self._out, self._tells = about, out, tells

    def found(self, case: Case, way: str, ms: dict[str, Any], dtype: torch.dtype) -> None:
        """Of a way that has run; one that is further from one process than the dtype rounds is an error."""
        if not ms.get("apart", 0.0) < FAR[dtype]:
            self.failed(case, way, f"{ms['apart']:.2g} from one process, in the 2-norm: that is no rounding")
            return
        self.cases.setdefault(str(case), {})[way] = ms
        self._say(f"{case}, {way}: " + ", ".join(f"{n} {x:.4g}" for n, x in ms.items() if isinstance(x, float)))

    def failed(self, case: Case, way: str, why: str) -> None:
        """Of a way that has not."""
        self.errors.setdefault(str(case), {})[way] = why
        self._say(f"{case}, {way}: {why}")

    def _say(self, line: str) -> None:
        if self._tells:
            print(line, flush=True)
            if self._out is not None:
                whole = self._about | {"cases": self.cases, "errors": self.errors}
                self._out.write_text(json.dumps(whole, indent=1) + "\n")


def compared(case: Case, cp: Axis, world: World, said: Said, results: Results) -> None:
    """Every way that is asked for. What ours raise is raised."""
    device, dtype = world.device, torch.bfloat16 if world.device.type == "cuda" else torch.float32
    truth = Truth(case, cp, device, dtype)
    for name, way in ours(case, cp, device).items():
        if said.ways != "torch" or name in REFERENCES:
            kernels = said.kernels and name in (REFERENCES[1], OURS[0]) and device.type == "cuda"
            results.found(case, name, measured(partial(_as_is, way), truth, said.calls, kernels=kernels), dtype)
    if said.ways == "ours":
        return
    made, errors = torchs(case, world, autotune=said.autotune)
    for name, why in errors.items():
        results.failed(case, name, why)
    for name, make in made.items():
        if device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            results.found(case, name, measured(make, truth, said.calls), dtype)
        except Exception as error:  # noqa: BLE001  # a peer's own failure, of any kind, must not end the run
            results.failed(case, name, f"{type(error).__name__}: {error}".partition("\n")[0])


def _as_is(way: Way) -> Way:
    return way


@dataclass(frozen=True)
class Said:
    """What is measured, and how."""

    ways: str = "all"
    calls: int = 10
    kernels: bool = False
    autotune: bool = True


def main(words: Sequence[str]) -> int:
    """1 if a way of ours is no result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", default="8192", help="of a rank; several, separated by commas")
    parser.add_argument("--rows", default="causal", help="causal, packed or both, separated by commas")
    parser.add_argument("--ways", choices=("all", "ours", "torch"), default="all")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--calls", type=int, default=10, help="of the shortest rows; fewer of longer ones, 3 at least")
    parser.add_argument("--kernels", action="store_true", help="kernels of all-gather and of the whole row, too")
    parser.add_argument("--no-autotune", action="store_true", help="FlexAttention without max_autotune: minutes less")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    said = parser.parse_args(words)
    how = Said(said.ways, said.calls, said.kernels, not said.no_autotune)
    kinds = [{"causal": False, "packed": True}[kind] for kind in said.rows.split(",")]
    lengths = [int(n) for n in said.tokens.split(",")]
    cases = [Case(n, said.heads, said.kv_heads, said.dim, kind) for n in lengths for kind in kinds]
    with initialize(device=said.device) as world:
        gpu = world.device.type == "cuda"
        size = max(lengths) * 2 * said.kv_heads * said.dim * 2  # as a run has it
        options = {"cp": GroupOptions(peer_buffer=size)} if gpu and world.size > 1 else {}
        about = {"command": shlex.join(["-m", "benchmarks.context_parallel", *words]), "torch": torch.__version__}
        device = torch.cuda.get_device_name() if gpu else "cpu"
        results = Results(about | {"device": f"{world.size} x {device}"}, said.out, tells=world.rank == 0)
        with ParallelState.build(Layout.of(cp=world.size), world, options=options) as state:
            for case in cases:
                calls = max(3, said.calls * min(lengths) // case.tokens)
                compared(case, state.axis("cp"), world, replace(how, calls=calls), results)
        if world.rank == 0:
            for case in cases:
                show(results, case)
    return int(any(name in errors for errors in results.errors.values() for name in OURS))


def show(results: Results, case: Case) -> None:
    """Times, and the part of the speed of one rank with the same work."""
    columns = ("way", "forward, ms", "both, ms", *(f"of {name}" for name in REFERENCES), "from one process")
    title = f"{case}, {case.heads} heads of {case.dim}, {case.kv_heads} of keys"
    table = Table(*columns, title=title, box=None)
    found = results.cases.get(str(case), {})
    for name, ms in found.items():
        both = ms.get("both_ms")
        shares = ["" if both is None else f"{found[one]['both_ms'] / both:.1%}" for one in REFERENCES]
        apart = f"{ms['apart']:.1e}" if "apart" in ms else ""
        table.add_row(name, f"{ms['forward_ms']:.2f}", "" if both is None else f"{both:.2f}", *shares, apart)
    Console(width=130).print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
