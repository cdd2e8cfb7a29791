"""How to split a backward into input gradients (I) and weight gradients (W)?

    python benchmarks/spike_split_backward.py

Compares four ways on a stack of residual MLP blocks: exact in fp64 against one backward, seconds for I and W
beside a whole backward, bytes that the graph still holds between I and W, and whether it survives torch.compile.

    twice     autograd.grad for the input, then again for the parameters
    torch     the functions of torch.distributed.pipelining
    cut       one walk of the graph finds the nodes where parameters join; W runs those nodes alone
    queue     a linear that leaves its weight gradient in a queue that it was given
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge, saved_tensors_hooks
from torch.distributed.pipelining import _backward as torch_split

HEADS = 4

DeferredGradients = list[partial[None]]


@dataclass
class Halves:
    """The two halves of one backward, and the tensors that the first keeps for the second beside the graph."""

    i: Callable[[], Tensor]
    w: Callable[[], None]
    kept: Callable[[], list[Tensor]] = list


class QueuedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, deferred: DeferredGradients) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.deferred = deferred
        return x @ w.mT

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, w = ctx.saved_tensors
        ctx.deferred.append(partial(weight_gradient, x, w, dy))
        return dy @ w, None, None


def weight_gradient(x: Tensor, w: Tensor, dy: Tensor) -> None:
    # From the leaf on, so that hooks on the parameter run as in any backward.
    torch.autograd.backward(get_gradient_edge(w), dy.flatten(0, -2).mT @ x.flatten(0, -2))


class Linear(nn.Linear):
    deferred: DeferredGradients | None = None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.deferred is None else QueuedLinear.apply(x, self.weight, self.deferred)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = Linear(width, 3 * width, bias=False), Linear(width, width, bias=False)
        self.up, self.down = Linear(width, 4 * width, bias=False), Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(1, 2, 0, 3).unsqueeze(1)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.squeeze(0).movedim(0, 1).flatten(1))
        y: Tensor = x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))
        return y


def twice(model: nn.Module, x: Tensor, y: Tensor, dy: Tensor) -> Halves:
    edge, params = get_gradient_edge(y), list(model.parameters())

    def i() -> Tensor:
        return torch.autograd.grad(edge, x, dy, retain_graph=True)[0]

    def w() -> None:
        for p, g in zip(params, torch.autograd.grad(edge, params, dy), strict=True):
            p.grad = g

    return Halves(i, w, lambda: [dy])


def torchs(model: nn.Module, x: Tensor, y: Tensor, dy: Tensor) -> Halves:
    groups: list[Any] = []

    def i() -> Tensor:
        (dx,), found = torch_split.stage_backward_input([y], [dy], [x], model.parameters())
        groups.extend(found)
        return dx

    def w() -> None:
        torch_split.stage_backward_weight(model.parameters(), groups)

    return Halves(i, w, lambda: [g for found in groups for grads in found["grads"] for g in grads])


def children(node: Node) -> list[Node]:
    return [n for n, _ in node.next_functions if n is not None]


def cut_nodes(edge: GradientEdge, x: Tensor) -> list[tuple[Node, list[GradientEdge]]]:
    """Nodes on the way to x that parameters join too, with the edges that lead to parameters alone."""
    goal = get_gradient_edge(x).node
    reaches = {goal: True}
    order: list[Node] = []
    stack = [(edge.node, False)]
    while stack:
        node, back = stack.pop()
        if back:
            reaches[node] = any(reaches[n] for n in children(node))
            order.append(node)
        elif node not in reaches:
            reaches[node] = False
            stack += [(node, True), *((n, False) for n in children(node))]
    found = []
    for node in reversed(order):
        sides = [GradientEdge(n, i) for n, i in node.next_functions if n is not None and not reaches[n]]
        if reaches[node] and sides:
            found.append((node, sides))
    return found


def cut(_: nn.Module, x: Tensor, y: Tensor, dy: Tensor) -> Halves:
    edge = get_gradient_edge(y)
    nodes = cut_nodes(edge, x)
    arrived: dict[Node, tuple[Tensor | None, ...]] = {}

    def keep(node: Node, grads: tuple[Tensor | None, ...]) -> None:
        arrived[node] = grads

    def i() -> Tensor:
        handles = [node.register_prehook(partial(keep, node)) for node, _ in nodes]
        try:
            return torch.autograd.grad(edge, x, dy, retain_graph=True)[0]
        finally:
            for handle in handles:
                handle.remove()

    def w() -> None:
        while nodes:
            node, sides = nodes.pop(0)
            pairs = [(GradientEdge(node, k), g) for k, g in enumerate(arrived.pop(node)) if g is not None]
            edges, grads = zip(*pairs, strict=True)
            torch.autograd.backward(sides, torch.autograd.grad(edges, sides, grads))  # type: ignore[arg-type]

    return Halves(i, w, lambda: [g for grads in arrived.values() for g in grads if g is not None])


def queue(model: nn.Module, x: Tensor, y: Tensor, dy: Tensor) -> Halves:
    edge = get_gradient_edge(y)
    deferred: DeferredGradients = next(
        m.deferred for m in model.modules() if isinstance(m, Linear) and m.deferred is not None
    )

    def i() -> Tensor:
        torch.autograd.backward(edge, dy)
        assert x.grad is not None
        return x.grad

    def w() -> None:
        while deferred:
            deferred.pop(0)()

    return Halves(i, w, lambda: [t for job in deferred for t in (job.args[0], job.args[2])])


def whole(_: nn.Module, x: Tensor, y: Tensor, dy: Tensor) -> Halves:
    edge = get_gradient_edge(y)

    def i() -> Tensor:
        torch.autograd.backward(edge, dy)
        assert x.grad is not None
        return x.grad

    return Halves(i, lambda: None)


WAYS = {"whole": whole, "twice": twice, "torch": torchs, "cut": cut, "queue": queue}


@dataclass
class Held:
    """Bytes of storages, other than the parameters', that a graph holds; each storage counts once."""

    parameters: set[int]
    uses: dict[int, int] = field(default_factory=dict)
    bytes: int = 0

    def pack(self, x: Tensor) -> Packed:
        return Packed(self, x)

    def add(self, x: Tensor, uses: int) -> None:
        storage = x.untyped_storage()
        if storage.data_ptr() in self.parameters:
            return
        before = self.uses.get(storage.data_ptr(), 0)
        self.uses[storage.data_ptr()] = before + uses
        if (before == 0) != (before + uses == 0):
            self.bytes += storage.nbytes() if uses > 0 else -storage.nbytes()


class Packed:
    def __init__(self, held: Held, x: Tensor) -> None:
        self.held, self.x = held, x.detach()
        held.add(self.x, 1)

    def __del__(self) -> None:
        self.held.add(self.x, -1)


def build(depth: int, width: int, dtype: torch.dtype, deferred: DeferredGradients | None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(width) for _ in range(depth))).to(dtype)
    for module in model.modules():
        if isinstance(module, Linear):
            module.deferred = deferred
    return model


@dataclass
class Result:
    seconds: dict[str, float]
    held: tuple[int, int]
    gradients: list[Tensor]


def run(way: str, depth: int, width: int, rows: int, dtype: torch.dtype, backend: str = "") -> Result:
    deferred: DeferredGradients | None = [] if way == "queue" else None
    model = build(depth, width, dtype, deferred)
    call = torch.compile(model, backend=backend) if backend else model
    generator = torch.Generator().manual_seed(1)
    x0, dy = (torch.randn(rows, width, generator=generator, dtype=dtype) for _ in range(2))
    seconds: dict[str, list[float]] = {"I": [], "W": []}
    for _ in range(2 if backend else 5):
        model.zero_grad()
        x = x0.clone().requires_grad_()
        held = Held({p.untyped_storage().data_ptr() for p in model.parameters()})
        with nullcontext() if backend else saved_tensors_hooks(held.pack, lambda p: p.x):
            y = call(x)
        before = held.bytes
        halves = WAYS[way](model, x, y, dy)
        begin = time.thread_time()
        dx = halves.i()
        seconds["I"].append(time.thread_time() - begin)
        del y
        for t in halves.kept():
            held.add(t, 1)
        between = before, held.bytes
        begin = time.thread_time()
        halves.w()
        seconds["W"].append(time.thread_time() - begin)
    grads = [dx, *(p.grad for p in model.parameters() if p.grad is not None)]
    assert len(grads) == 1 + len(list(model.parameters())), "parameters without a gradient"
    return Result({k: min(v) for k, v in seconds.items()}, between, grads)


def error(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(a, b, strict=True))


def compiled(way: str, backend: str, exact: Result) -> str:
    torch._dynamo.reset()
    try:
        return f"{error(run(way, *SMALL, backend=backend).gradients, exact.gradients):.0e}"
    except Exception as problem:  # noqa: BLE001  # what fails is the finding
        return f"{type(problem).__name__}: {str(problem).splitlines()[0]}"


SMALL = 3, 16, 5, torch.float64
LARGE = 4, 512, 1024, torch.float32


def main() -> None:
    torch.set_num_threads(1)
    exact, large = run("whole", *SMALL), run("whole", *LARGE)
    base = large.seconds["I"]
    print(f"torch {torch.__version__}, 1 thread; a whole backward takes {1e3 * base:.0f} ms of CPU time")
    print(f"{'':8}{'error, fp64':>12}{'I':>8}{'W':>8}{'I + W':>8}   held between I and W")
    for way in WAYS:
        fp64, r = run(way, *SMALL), run(way, *LARGE)
        i, w = r.seconds["I"] / base, r.seconds["W"] / base
        print(
            f"{way:8}{error(fp64.gradients, exact.gradients):>12.0e}{i:>8.2f}{w:>8.2f}{i + w:>8.2f}"
            f"{r.held[1] / 2**20:>8.0f} MiB; the graph held {r.held[0] / 2**20:.0f}"
        )
    print("\ncompiled whole, error or exception:")
    for way in WAYS:
        for backend in ("aot_eager", "inductor"):
            print(f"{way:8}{backend:12}{compiled(way, backend, exact)}")


if __name__ == "__main__":
    main()
