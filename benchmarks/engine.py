"""What the engine of data parallelism costs where there is nothing to parallelize: a user's module on one device.

    python -m benchmarks.engine [--shape D1] [--steps 40] [--turns 4] [--device cuda] [--out FILE.json]

The plain PyTorch peer's model, its blocks and its loss compiled, in its ordinary loop, three times over:

- `plain`: no engine. bf16 weights, of which fp32 masters are torch's fused AdamW's parameters. Gradients are copied to
  fp32 (of later microbatches: added), AdamW divides them by the norm that clips them, masters are rounded to weights.
- `shard none`, `shard fsdp`: `stretto.shard`, and the update of `stretto train`: the same in the same precision.

The ways take turns on the device (A B C C B A). Losses are told, for they must agree.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from benchmarks.train.measure import Spread, step_times
from benchmarks.train.peers.torch_model import Model, fill, loss_of
from benchmarks.train.peers.torch_peer import BACKENDS, DTYPES
from benchmarks.train.shapes import SHAPES, Shape
from benchmarks.train.trace import trace_step
from benchmarks.train.worker import device_name, versions
from stretto import Layout, ParallelState, initialize
from stretto.distributed import shard
from stretto.train.optimizers import AdamW

RULE = AdamW(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
CLIP = 1.0
BATCHES = 4
PLAIN = "plain"
LEAST = 0.005
"""Milliseconds of a step: kernels that differ by less are not shown."""


class Plain:
    """No engine; see above. What is fp32 is its own master."""

    def __init__(self, module: nn.Module, lr: float) -> None:
        self.params, self.done = list(module.parameters()), 0
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.params]
        self.narrow = self.masters[0] is not self.params[0]
        if self.narrow:
            for master in self.masters:
                master.grad = torch.zeros_like(master)
        decay = [m for m in self.masters if m.dim() > 1]
        rest = [m for m in self.masters if m.dim() == 1]
        groups = [{"params": decay, "weight_decay": RULE.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, lr=lr, betas=RULE.betas, eps=RULE.eps, fused=True)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        if self.narrow:
            wide, grads = [m.grad for m in self.masters], [p.grad for p in self.params]
            (torch._foreach_add_ if self.done else torch._foreach_copy_)(wide, grads)  # type: ignore[operator]
            for p in self.params:
                p.grad = None
        self.done += 1

    @torch.no_grad()
    def step(self) -> None:
        grads = [m.grad for m in self.masters if m.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        # The fused kernel divides gradients by this on its way, which saves a pass over them.
        self.adam.grad_scale = ((norm + 1e-6) / CLIP).clamp(min=1.0)  # type: ignore[attr-defined]
        self.adam.found_inf = torch.zeros_like(norm)  # type: ignore[attr-defined]
        self.adam.step()
        if self.narrow:
            torch._foreach_copy_(self.params, self.masters)
        else:
            self.adam.zero_grad()
        self.done = 0


class Engine:
    """`stretto.shard`."""

    def __init__(self, module: nn.Module, lr: float, microbatches: int, state: ParallelState, mode: str) -> None:
        self.lr = lr
        self.sharded = shard(module, state, sharding=mode, microbatches=microbatches)
        self.optimizer = self.sharded.optimizer(RULE, clip_grad=CLIP)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step(self.lr)


@dataclass
class Loop:
    """One way: a step of its own model, and the loss of each step."""

    model: nn.Module
    update: Plain | Engine
    loss: Callable[[Tensor, Tensor, float], Tensor]
    batches: Sequence[Sequence[tuple[Tensor, Tensor]]]
    around: Callable[[], Any] = nullcontext
    steps: int = 0
    lost: list[Tensor] = field(default_factory=list)

    def step(self) -> None:
        """Forward, backward and update."""
        microbatches = self.batches[self.steps % len(self.batches)]
        self.steps += 1
        count = float(sum(labels.numel() for _, labels in microbatches))
        losses = []
        with self.around():
            for tokens, labels in microbatches:
                loss = self.loss(self.model(tokens), labels, count)
                self.update.backward(loss)
                losses.append(loss.detach())
        self.lost.append(torch.stack(losses).sum())
        self.update.step()


def model_of(shape: Shape, device: torch.device, dtype: torch.dtype, *, compiled: bool) -> Model:
    """The same weights for every way."""
    with torch.device(device):
        model = Model(shape, range(shape.layers), packed=True, expand=True, dtype=dtype)
    fill(model, shape, seed=1234)
    model.to(dtype)
    for block in model.blocks.values() if compiled else ():
        block.compile()
    return model


def batches_of(shape: Shape, device: torch.device) -> list[list[tuple[Tensor, Tensor]]]:
    """Random tokens, on the device beforehand."""
    generator = torch.Generator().manual_seed(0)
    size = (BATCHES, shape.microbatches(1), shape.micro_batch, shape.seq_len + 1)
    drawn = torch.randint(shape.vocab, size, generator=generator).to(device)
    return [[(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in each] for each in drawn]


def compared(said: argparse.Namespace, state: ParallelState, stack: ExitStack) -> dict[str, Any]:
    """Times, losses and kernels of all ways."""
    shape, device, dtype = SHAPES[said.shape], state.world.device, DTYPES[said.dtype]
    gpu, n = device.type == "cuda", shape.microbatches(1)
    batches, loss = batches_of(shape, device), torch.compile(loss_of) if gpu else loss_of
    around = partial(sdpa_kernel, BACKENDS, set_priority=True) if gpu else nullcontext
    loops: dict[str, Loop] = {}
    for name in (PLAIN, "shard none", "shard fsdp"):
        model = model_of(shape, device, dtype, compiled=gpu)
        if name == PLAIN:
            update: Plain | Engine = Plain(model, said.lr)
        else:
            update = Engine(model, said.lr, n, state, name.partition(" ")[2])
            stack.callback(update.sharded.close)
        loops[name] = Loop(model, update, loss, batches, around)
    for loop in loops.values():
        step_times(loop.step, said.warmup, device)
    times: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(said.turns):
        for name in list(loops)[:: -1 if turn % 2 else 1]:
            step_times(loops[name].step, 3, device)
            times[name] += step_times(loops[name].step, -(-said.steps // said.turns), device)
    found: dict[str, Any] = {
        "ms": {name: asdict(Spread.of(each)) for name, each in times.items()},
        "all_ms": times,
        "losses": {name: torch.stack(loop.lost).tolist() for name, loop in loops.items()},
        "warmup": said.warmup,
    }
    if gpu:
        found["kernels_ms"] = {name: kernels_of(loop.step, device) for name, loop in loops.items()}
    return found


def kernels_of(step: Callable[[], object], device: torch.device) -> dict[str, tuple[float, int]]:
    """Milliseconds and number of each kernel and copy of one step, by name."""
    kernels, _ = trace_step(step, device)
    took: dict[str, list[float]] = {}
    for kernel in kernels:
        took.setdefault(kernel.name, []).append(kernel.end - kernel.start)
    return {name: (sum(each), len(each)) for name, each in took.items()}


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="D1")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--steps", type=int, default=40, help="measured steps of each way")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    said = parser.parse_args(words)
    with (
        initialize(device=said.device) as world,
        ParallelState.build(Layout.of(), world) as state,
        ExitStack() as stack,
    ):
        about = {"command": shlex.join(["python -m benchmarks.engine", *words]), "device": device_name(world.device)}
        found = about | {"versions": versions(), "shape": said.shape, "dtype": said.dtype}
        found |= compared(said, state, stack)
    show(found)
    if said.out is not None:
        said.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def show(found: Mapping[str, Any]) -> None:
    """Times; and what kernels of the ways differ by."""
    console, plain = Console(width=150), found["ms"][PLAIN]["median"]
    title = f"{found['shape']}, {found['dtype']}, {found['device']}"
    table = Table("way", "ms a step", "p10 .. p90", "more than plain", "loss after warm-up", title=title, box=None)
    for name, ms in found["ms"].items():
        more = "" if name == PLAIN else f"{ms['median'] / plain - 1:+.2%}"
        spread = f"{ms['p10']:.2f} .. {ms['p90']:.2f}"
        table.add_row(name, f"{ms['median']:.2f}", spread, more, f"{found['losses'][name][found['warmup'] - 1]:.6f}")
    console.print(table)
    if "kernels_ms" not in found:
        return
    ways: Mapping[str, Mapping[str, tuple[float, int]]] = found["kernels_ms"]
    none = (0.0, 0)
    apart = {
        name: max(abs(own.get(name, none)[0] - ways[PLAIN].get(name, none)[0]) for own in ways.values())
        for name in {name for own in ways.values() for name in own}
    }
    table = Table("ms of a step (number)", *ways, title="kernels and copies whose sums differ", box=None)
    for name in sorted((name for name in apart if apart[name] >= LEAST), key=lambda name: -apart[name]):
        cells = (f"{ms:.3f} ({n})" if n else "" for ms, n in (own.get(name, none) for own in ways.values()))
        table.add_row(name if len(name) <= 80 else f"{name[:60]} .. {name[-16:]}", *cells)
    sums = ((sum(ms for ms, _ in own.values()), sum(n for _, n in own.values())) for own in ways.values())
    table.add_row("all kernels", *(f"{ms:.3f} ({n})" for ms, n in sums))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
