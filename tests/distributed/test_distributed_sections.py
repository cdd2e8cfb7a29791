"""What a stage is gathered by: nothing is read before it has come.

Faults to catch: a backward that does not wait for what is in no section.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stretto.collectives import all_gather_into
from stretto.distributed import DataParallel, bucket
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.params import Init, ParamSpec, declare
from stretto.schedule.sharding import MODES
from stretto.testing import Pool
from stretto.world import World

pytestmark = pytest.mark.gloo

WIDTH = 4


class Late:
    """A gather that brings nothing before it is waited for."""

    def __init__(self, out: Tensor, x: Tensor, axis: Any) -> None:
        self.out, self.came = out.fill_(torch.nan), torch.empty_like(out)
        all_gather_into(self.came, x, axis).wait()

    def wait(self) -> None:
        self.out.copy_(self.came)


class Net(nn.Module):
    """A block, and a scale that is in none, which the backward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False)])
        self.scale = nn.Parameter(torch.ones(WIDTH))
        declare(self.blocks[0], "weight", ParamSpec((WIDTH, WIDTH), Init(std=1.0)))
        declare(self, "scale", ParamSpec((WIDTH,), Init(mean=1.0)))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) * self.scale
        return x.square().sum()


def backward(world: World) -> list[bool]:
    with ParallelState.build(Layout.of(dp=world.size), world) as state, pytest.MonkeyPatch.context() as patch:
        patch.setattr(bucket, "all_gather_into", Late)
        net = Net()
        with DataParallel({0: net}, state, sharding=MODES["fsdp"], visits={0: [False, True]}) as weights:
            weights.zero()
            weights.unshard(0)
            loss = net(torch.ones(2, WIDTH))
            weights.reshard(0)
            weights.unshard(0)
            weights.reduce(0)
            loss.backward()
            weights.reshard(0)
            weights.finish()
            return [bool(bucket.grad.isfinite().all()) for bucket in weights.all_buckets]


def test_a_backward_waits_for_what_is_in_no_section(pool: Pool) -> None:
    assert pool.run(2, backward) == [[True, True]] * 2
