"""Modules of one's own as the stages of a pipeline, under any schedule.

python examples/own_stages.py zbv                  # 2 local processes, 4 stages in a V
python examples/own_stages.py interleaved-zb       # the same losses
"""

import sys
from functools import partial

import torch
from torch import nn

from stretto.initialize import initialize
from stretto.launch.local import run_local
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.pipeline_parallel import Pipeline, TensorMeta
from stretto.schedule import schedule_for

RANKS, MICROBATCHES, ROWS, WIDTH = 2, 8, 4, 32


class Layer(nn.Module):
    """x + tanh(linear(x)), or on the last stage the loss."""

    def __init__(self, stage: int, last: int) -> None:
        super().__init__()
        torch.manual_seed(stage)  # each stage draws its own weights, whoever holds it
        self.linear, self.last = nn.Linear(WIDTH, WIDTH), stage == last

    def forward(self, x: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
        x = rows if x is None else x
        x = x + torch.tanh(self.linear(x))
        return (x - rows.flip(0)).square().mean() / MICROBATCHES if self.last else x


def work(name: str) -> int:
    """What each process does."""
    with initialize(device="cpu") as world, ParallelState.build(Layout.of(pp=RANKS), world) as state:
        schedule = schedule_for(name, RANKS, MICROBATCHES)
        make = partial(Layer, last=schedule.num_stages - 1)
        pipeline = Pipeline(make, schedule, state.axis("pp"), TensorMeta((ROWS, WIDTH), torch.float32))
        optimizer = torch.optim.AdamW(pipeline.parameters(), lr=3e-3)
        for step in range(20):
            loss = pipeline.step(torch.randn(MICROBATCHES, ROWS, WIDTH, generator=torch.Generator().manual_seed(step)))
            optimizer.step()
            optimizer.zero_grad()
            if schedule.placement[-1] == world.rank and step % 5 == 4:
                print(f"step {step + 1}: loss {loss:.6f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_local(RANKS, partial(work, sys.argv[1] if len(sys.argv) > 1 else "zbv")))
