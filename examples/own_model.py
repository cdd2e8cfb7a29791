"""A model of one's own over tensor, pipeline and data parallel ranks, with checkpoints; started again, it goes on.

python examples/own_model.py            # 8 local processes: tp=2 x pp=2 x dp=2; under torchrun or srun, its ranks
python examples/own_model.py 1          # the same model in one process: the same losses
"""

import sys
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stretto

LAYERS, WIDTH, ROWS, MICRO = 5, 24, 48, 4


class Residual(nn.Module):
    """x + down(gelu(up(norm(x)))): [b, d] -> [b, d], its hidden features cut over the tp ranks."""

    def __init__(self, build):
        super().__init__()
        self.norm = stretto.replicate(nn.LayerNorm(WIDTH))
        self.up = stretto.ColumnParallelLinear(WIDTH, 4 * WIDTH, build, bias=True, init=stretto.Init(std=0.1))
        self.down = stretto.RowParallelLinear(4 * WIDTH, WIDTH, build, bias=True, init=stretto.Init(std=0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def stage(spec: stretto.StageSpec) -> nn.Module:
    """The layers of a pipeline stage, by their global numbers."""
    return nn.Sequential(OrderedDict((f"layer{n}", Residual(spec.build)) for n in spec.layers(LAYERS)))


def batch(step: int, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a step [ROWS, WIDTH]; every rank makes all rows, the trainer takes its own."""
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(step)).to(dtype)
    return x, x.roll(1, 1).sin()


def train(world: stretto.World, layout: stretto.Layout, steps: int = 200, listeners=(), **more) -> stretto.Outcome:
    said = {"data": batch, "loss": F.mse_loss, "lr": 3e-3, "global_batch": ROWS, "micro_batch": MICRO, **more}
    with stretto.ParallelState.build(layout, world) as state:
        with stretto.Trainer(stage, state, boundary=(MICRO, WIDTH), save_every=50, resume=True, **said) as trainer:
            return trainer.fit(steps, listeners)


def main() -> int:
    with stretto.initialize() as world:
        tp, pp = (2, 2) if world.size % 4 == 0 else (1, 1)
        layout = stretto.Layout.of(tp=tp, pp=pp, dp=world.size // (tp * pp))
        train(world, layout, listeners=[stretto.LiveProgress()], out="runs/own_model")
    return 0


if __name__ == "__main__":
    sys.exit(stretto.run_local(int(sys.argv[1]) if sys.argv[1:] else 8, main))
