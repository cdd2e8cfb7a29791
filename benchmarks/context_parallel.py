"""Attention over cp: every way of ours, a plain ring and torch's own, against one rank with the same work for each.

    torchrun --nproc-per-node 2 -m benchmarks.context_parallel [--tokens 8192] [--packed] [--device cuda] [--calls 20]

`--tokens` are those of a rank. The plain ring is the textbook's (Liu et al., 2023; Zhu, "ring-flash-attention", 2024):
one block of keys after another, all transfers waited for, each block's output merged in the dtype of the run. torch's
own are those of `benchmarks.context_torch`. Output and gradients of each way are held against one process that has the
whole row: what is further from them than the dtype rounds is no result.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.context_torch import torchs
from benchmarks.context_ways import OURS, Case, Way, alone, ours
from stretto import Layout, ParallelState, initialize
from stretto.attention import PLAIN
from stretto.collectives import all_reduce
from stretto.parallel_state import GroupOptions
from stretto.world import Axis, World

FAR = {torch.bfloat16: 0.02, torch.float32: 1e-5}
"""Distances in the 2-norm, as a share of the whole, that are no rounding."""


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


def measured(make: Callable[[], Way], truth: Truth, calls: int) -> dict[str, float]:
    """Milliseconds of a forward, and of both; how far it is from one process."""
    way = make()
    with way.around():
        found = {} if way.places is None else {"apart": truth.apart(way)}
        q, k, v = truth.own(way)

        def both() -> None:
            way.attend(q, k, v, PLAIN, way.structure).backward(torch.ones_like(q))

        with torch.no_grad():
            one = timed(lambda: way.attend(q, k, v, PLAIN, way.structure), q.device, calls)
        found["forward_ms"] = 1e3 * way.work * one
        if way.backward:
            found["both_ms"] = 1e3 * way.work * timed(both, q.device, calls)
    return found


def compared(case: Case, cp: Axis, world: World, calls: int) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Every way's figures, told as they come; and why there are none of some. What ours raise is raised."""
    device, dtype = world.device, torch.bfloat16 if world.device.type == "cuda" else torch.float32
    truth = Truth(case, cp, device, dtype)
    found: dict[str, dict[str, float]] = {}

    def tell(name: str) -> None:
        if world.rank == 0:
            print(f"{name}: " + ", ".join(f"{what} {value:.4g}" for what, value in found[name].items()), flush=True)

    for name, way in ours(case, cp, device).items():
        found[name] = measured(partial(_as_is, way), truth, calls)
        tell(name)
    made, errors = torchs(case, world)
    for name, make in made.items():
        if device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            found[name] = measured(make, truth, calls)
            tell(name)
        except Exception as error:  # noqa: BLE001  # a peer's own failure, of any kind, must not end the run
            errors[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
    for name in [name for name, ms in found.items() if not ms.get("apart", 0.0) < FAR[dtype]]:
        errors[name] = f"{found.pop(name)['apart']:.2g} from one process, in the 2-norm: that is no rounding"
    return found, errors


def _as_is(way: Way) -> Way:
    return way


def main(words: Sequence[str]) -> int:
    """1 if a way of ours is no result."""
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
    case = Case(said.tokens, said.heads, said.kv_heads, said.dim, said.packed)
    with initialize(device=said.device) as world:
        gpu = world.device.type == "cuda"
        size = said.tokens * 2 * said.kv_heads * said.dim * 2
        options = {"cp": GroupOptions(peer_buffer=size)} if gpu and world.size > 1 else {}
        with ParallelState.build(Layout.of(cp=world.size), world, options=options) as state:
            found, errors = compared(case, state.axis("cp"), world, said.calls)
        if world.rank == 0:
            show(found, errors, case)
            about = {"command": shlex.join(["-m", "benchmarks.context_parallel", *words]), "torch": torch.__version__}
            device = torch.cuda.get_device_name() if gpu else "cpu"
            if said.out is not None:
                whole = about | {"device": f"{world.size} x {device}", "ms": found, "errors": errors}
                said.out.write_text(json.dumps(whole, indent=1) + "\n")
    return int(any(name in errors for name in OURS))


def show(found: dict[str, dict[str, float]], errors: dict[str, str], case: Case) -> None:
    """Times, and the part of the speed of one rank with the same work."""
    kind = "packed" if case.packed else "causal"
    title = f"{case.tokens} tokens a rank, {kind}, {case.heads} heads of {case.dim}, {case.kv_heads} of keys"
    columns = "way", "forward, ms", "both, ms", "of one rank, forward", "both", "from one process"
    table = Table(*columns, title=title, box=None)
    one = found["one rank"]
    for name, ms in found.items():
        both = ms.get("both_ms")
        share = "" if both is None else f"{one['both_ms'] / both:.1%}"
        told = "" if both is None else f"{both:.2f}"
        apart = f"{ms['apart']:.1e}" if "apart" in ms else ""
        table.add_row(
            name, f"{ms['forward_ms']:.2f}", told, f"{one['forward_ms'] / ms['forward_ms']:.1%}", share, apart
        )
    Console(width=130).print(table)
    for name, why in errors.items():
        print(f"{name}: {why}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
