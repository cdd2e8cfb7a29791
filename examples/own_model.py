"""A model of one's own over tensor, pipeline and data parallel ranks.

python examples/own_model.py            # 8 local processes: tp=2 x pp=2 x dp=2
python examples/own_model.py 1          # the same model in one process: the same losses
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stretto.data.feed import rows_of
from stretto.distributed import AdamW, DataParallel
from stretto.initialize import initialize
from stretto.launch.local import run_local
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.params import Init, ParamSpec, declare
from stretto.pipeline_parallel import Executor, Link, Stage, TensorMeta
from stretto.schedule import DDP, lower, one_f_one_b, partition
from stretto.tensor_parallel import Build, ColumnParallelLinear, RowParallelLinear, declare_norm
from stretto.train.step import Trainer
from stretto.world import World

LAYERS, WIDTH, ROWS, MICRO = 5, 24, 48, 4


@dataclass(frozen=True)
class Rows:
    """What the stages are called with: inputs and targets [MICRO, WIDTH]."""

    x: Tensor
    y: Tensor


class Residual(nn.Module):
    """x + down(gelu(up(norm(x)))): [b, d] -> [b, d], its hidden features cut over the tp ranks."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.norm = declare_norm(nn.LayerNorm(WIDTH, dtype=build.dtype, device=build.device), sequence_parallel=False)
        self.up = ColumnParallelLinear(WIDTH, 4 * WIDTH, build, bias=True, init=Init(std=0.1))
        self.down = RowParallelLinear(4 * WIDTH, WIDTH, build, bias=True, init=Init(std=0.1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.gelu(self.up(self.norm(x))))
        return x + y


class Part(nn.Module):
    """The layers of one pipeline stage; the last stage returns the loss."""

    def __init__(self, layers: range, last: bool, build: Build) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(n): Residual(build) for n in layers})
        spec = ParamSpec((WIDTH,), Init(mean=1.0), weight_decay=False)  # whole on every rank
        self.scale = declare(self, "scale", spec, dtype=build.dtype, device=build.device) if last else None

    def forward(self, x: Tensor | None, rows: Rows) -> Tensor:
        x = rows.x if x is None else x
        for layer in self.layers.values():
            x = layer(x)
        return x if self.scale is None else (self.scale * x - rows.y).square().sum() / (ROWS * WIDTH)


def train(world: World, layout: Layout, *, steps: int = 40, dtype: torch.dtype = torch.float32) -> list[float]:
    """The loss of each step; the same in every layout."""
    with ParallelState.build(layout, world) as state:
        tp, pp, dp = state.axis("tp"), state.axis("pp"), state.axis("dp")
        build = Build(tp, sequence_parallel=False, dtype=dtype, device=world.device)
        part = Part(partition(LAYERS, pp.size)[pp.rank], pp.rank == pp.size - 1, build)
        stage = Stage(pp.rank, part, TensorMeta((MICRO, WIDTH), dtype) if pp.rank else None)
        program = lower(one_f_one_b(pp.size, ROWS // (MICRO * dp.size)), DDP)
        with DataParallel({pp.rank: part}, state) as weights:
            optimizer = AdamW(weights, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
            optimizer.initialize(seed=0)
            executor = Executor(program, pp.rank, {pp.rank: stage}, Link(pp, world.device), weights)
            trainer = Trainer(executor, weights, optimizer, clip_grad=1.0)
            losses = []
            for step in range(steps):
                x, y = batch(step, dtype)
                mine = [
                    Rows(x[r].to(world.device), y[r].to(world.device)) for r in rows_of(ROWS, dp.rank, dp.size, MICRO)
                ]
                losses.append(trainer.step(mine, lr=3e-3).loss.item())
            return losses


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The global batch of a step [ROWS, WIDTH]; every rank draws it whole and takes its rows."""
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    return x.to(dtype), x.roll(1, 1).sin().to(dtype)


def main() -> int:
    """Train as one rank of the world, and tell of it on the first."""
    with initialize() as world:
        layout = Layout.of(tp=2, pp=2, dp=world.size // 4) if world.size % 4 == 0 else Layout.of(dp=world.size)
        losses = train(world, layout)
    if world.rank == 0:
        print(f"{layout}: loss {losses[0]:.6f} -> {losses[-1]:.6f}")
    return 0


if __name__ == "__main__":
    sys.exit(run_local(int(sys.argv[1]) if sys.argv[1:] else 8, main))
