"""A program of one's own whose rank 1 is stuck in its data."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import stretto


def batches(rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    for n in range(9):
        if n == 3 and rank == 1:
            time.sleep(1000)
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(n))
        yield x, x.flip(1)


if __name__ == "__main__":
    with (
        stretto.initialize(seed=0, timeout=6) as world,
        stretto.ParallelState.build(stretto.Layout.of(dp=world.size), world) as state,
    ):
        data = batches(world.rank)
        stretto.Trainer(nn.Linear(8, 8), state, data=data, loss=nn.functional.mse_loss, global_batch=4).fit(9)
