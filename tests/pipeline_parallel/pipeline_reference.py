"""A small model cut into stages, the one-process reference, and one step of a pipeline that must equal it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stretto.pipeline_parallel import Executor, Link, OwnWeights, Stage, TensorMeta, Weights
from stretto.schedule import DDP, Action, Op, Schedule, Sharding, check, lower, requires
from stretto.world import Axis, World

ROWS = 3


@dataclass(frozen=True)
class Model:
    """`widths[s]` are the layer widths of stage s, from its input's to its output's; one width: no layers."""

    widths: tuple[tuple[int, ...], ...]
    seed: int = 0
    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    def part(self, stage: int) -> Part:
        part = Part(self.widths[stage], stage == 0, stage == len(self.widths) - 1)
        generator = torch.Generator().manual_seed(1000 * self.seed + stage)
        for p in part.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(self.dtype) * 0.5
        return part.to(self.device)

    def stage(self, stage: int) -> Stage:
        boundary = TensorMeta((ROWS, self.widths[stage][0]), self.dtype) if stage else None
        return Stage(stage, self.part(stage), boundary)

    def microbatches(self, m: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        sizes = self.widths[0][0], self.widths[-1][-1]
        return [
            tuple(
                torch.randn(ROWS, n, generator=generator, dtype=torch.float64).to(self.device, self.dtype)
                for n in sizes
            )
            for _ in range(m)
        ]  # type: ignore[misc]


class Part(nn.Module):
    def __init__(self, widths: tuple[int, ...], first: bool, last: bool) -> None:
        super().__init__()
        pairs = pairwise(widths)
        self.layers = nn.Sequential(*(m for a, b in pairs for m in (nn.Linear(a, b), nn.Tanh())))
        self.first, self.last = first, last

    def forward(self, x: Tensor | None, microbatch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = microbatch
        assert (x is None) == self.first
        y: Tensor = self.layers(inputs if x is None else x)
        return ((y - targets) ** 2).sum() / 7 if self.last else y


@dataclass
class Outcome:
    """What one process knows after a step."""

    loss: Tensor
    gradients: dict[str, Tensor]
    log: list[str] = field(default_factory=list)


def gradients(parts: dict[int, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{stage}.{name}": (torch.zeros_like(p) if p.grad is None else p.grad).cpu()
        for stage, part in parts.items()
        for name, p in part.named_parameters()
    }


def reference(model: Model, m: int) -> Outcome:
    parts: dict[int, nn.Module] = {s: model.part(s) for s in range(len(model.widths))}
    total = torch.zeros((), dtype=model.dtype, device=model.device)
    for microbatch in model.microbatches(m):
        x = None
        for part in parts.values():
            x = part(x, microbatch)
        assert x is not None
        total = total + x
    if total.requires_grad:
        total.backward()
    return Outcome(total.detach().cpu(), gradients(parts))


def pp_axis(world: World, name: str = "pp") -> Axis:
    ranks = tuple(range(world.size))
    return Axis(name, world.rank, ranks, dist.new_group(list(world.ranks)) if world.size > 1 else None)


def pairs(world: World) -> dict[tuple[int, int], Axis]:
    """A communicator for each two neighbours of the ring and each direction: all ranks make all of them."""
    ring = [(i, (i + 1) % world.size) for i in range(world.size) if world.size > 1]
    groups = {
        (a, b): dist.new_group([world.ranks[a], world.ranks[b]])
        for a, b in dict.fromkeys(pair for i, j in ring for pair in ((i, j), (j, i)))
    }
    return {
        ends: Axis(f"pp:{ends[0]}>{ends[1]}", sorted(ends).index(world.rank), tuple(sorted(ends)), group)
        for ends, group in groups.items()
        if world.rank in ends
    }


def run_step(
    world: World,
    model: Model,
    program: Schedule,
    two_ways: bool = False,
    steps: int = 1,
    weights: Weights | None = None,
) -> Outcome:
    axis = pp_axis(world)
    link = Link(axis, world.device, pairs(world) if two_ways else {})
    stages = {s: model.stage(s) for s, rank in enumerate(program.placement) if rank == world.rank}
    executor = Executor(program, world.rank, stages, link, weights or OwnWeights())
    batch = model.microbatches(program.num_microbatches)
    for _ in range(steps):
        for stage in stages.values():
            stage.module.zero_grad()
        loss = executor.step(batch)
    return Outcome(loss.cpu(), gradients({s: stage.module for s, stage in stages.items()}))


def assert_equal_to_reference(outcomes: list[Outcome], expected: Outcome, last_rank: int, tol: float = 1e-12) -> None:
    together = {name: g for outcome in outcomes for name, g in outcome.gradients.items()}
    assert together.keys() == expected.gradients.keys()
    for name, g in expected.gradients.items():
        assert close(together[name], g, tol), f"{name}: {together[name]} is not {g}"
    for rank, outcome in enumerate(outcomes):
        expected_loss = expected.loss if rank == last_rank else torch.zeros(())
        assert close(outcome.loss, expected_loss, tol), f"loss of rank {rank}: {outcome.loss}, not {expected_loss}"


def close(a: Tensor, b: Tensor, tol: float) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= tol * max(1.0, float(b.abs().max())))


def v_shape(p: int, m: int) -> Schedule:
    """Two stages on each rank, down and up again; backwards first, then the deepest forward."""
    placement = (*range(p), *reversed(range(p)))
    ops = (Op.F, Op.B)
    todo = [
        [Action(s, op, mb) for op in ops for s in range(2 * p) if placement[s] == r for mb in range(m)]
        for r in range(p)
    ]
    everything = Schedule(placement, m, tuple(map(tuple, todo)))
    out: list[list[Action]] = [[] for _ in range(p)]
    done: set[Action] = set()
    while any(todo):
        now = []
        for rank, left in enumerate(todo):
            ready = [a for a in left if all(need in done for need in requires(a, everything))]
            if ready:
                a = min(ready, key=lambda a: (a.op is Op.F, -a.stage, a.mb))
                left.remove(a)
                out[rank].append(a)
                now.append(a)
        done.update(now)
    s = Schedule(placement, m, tuple(map(tuple, out)))
    check(s)
    return s


def looped(p: int, m: int, rounds: int) -> Schedule:
    """GPipe over p * rounds stages dealt round the ranks: rank p-1 sends activations on to rank 0."""
    placement = tuple(s % p for s in range(p * rounds))
    stages = range(p * rounds)
    forwards = [[Action(s, Op.F, mb) for s in stages if placement[s] == r for mb in range(m)] for r in range(p)]
    backwards = [
        [Action(s, Op.B, mb) for s in reversed(stages) if placement[s] == r for mb in range(m)] for r in range(p)
    ]
    s = Schedule(placement, m, tuple((*f, *b) for f, b in zip(forwards, backwards, strict=True)))
    check(s)
    return s


Generator = Callable[[int, int], Schedule]


def program(generator: Generator, p: int, m: int, sharding: Sharding = DDP, **extra: Any) -> Schedule:
    return lower(generator(p, m, **extra), sharding)
