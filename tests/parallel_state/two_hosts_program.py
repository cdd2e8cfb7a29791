"""One rank of a job over two hosts: build a state, and print what each axis hears."""

from __future__ import annotations

import torch
import torch.distributed as dist

from stretto.initialize import initialize
from stretto.layout import Layout
from stretto.parallel_state import ParallelState

if __name__ == "__main__":
    with initialize(device="cpu", timeout=30) as world, ParallelState.build(Layout.of(tp=2, pp=2), world) as state:
        for name in ("tp", "pp"):
            axis = state.axis(name)
            x = torch.tensor(10.0**world.rank)
            dist.all_reduce(x, group=axis.group)
            print(f"rank {world.rank} {name} {x.item():g}", flush=True)
