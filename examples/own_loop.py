"""A plain module and a loop of one's own over data parallel ranks: torchrun --nproc-per-node 2 examples/own_loop.py"""

import torch
from torch import nn

import stretto

with stretto.initialize(seed=0) as world:
    with stretto.ParallelState.build(stretto.Layout.of(dp=world.size), world) as state:
        model = stretto.replicate(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1)), state)
        weights = stretto.DataParallel({0: model}, state)
        optimizer = stretto.AdamW(weight_decay=0.01)(weights)
        for step in range(100):
            x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step))[world.rank :: world.size]
            weights.zero()
            loss = (model(x) - x.sum(1, keepdim=True).sin()).square().sum() / 64
            loss.backward()
            weights.finish()
            optimizer.step(3e-3, stretto.clip_factor(stretto.grad_norm(weights), 1.0))
        print(f"rank {world.rank} of {world.size}: its part of the loss {loss.item():.6f}")
