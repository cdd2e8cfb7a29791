"""What a stage is gathered by: nothing is read before it has come.

Faults to catch: a backward that does not wait for what is in no section; a gather that is begun as it is needed where a
pass turns back; a step whose first sections wait for the whole update; a third section that stays.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stretto.collectives import all_gather_into
from stretto.distributed import AdamW, DataParallel, bucket
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


class Recorded(nn.Module):
    """Four blocks, of which each notes when a pass comes to it."""

    def __init__(self, told: list[str]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)])
        self.told = told
        for block in self.blocks:
            declare(block, "weight", ParamSpec((WIDTH, WIDTH), Init(std=1.0)))

    def forward(self, x: Tensor) -> Tensor:
        for n, block in enumerate(self.blocks):
            x = block(x)
            self.told.append(str(n))
            if x.requires_grad:
                x.register_hook(lambda _, n=n: self.told.append(str(n)))
        return x.square().sum()


def gathers(world: World) -> list[str]:
    """What happens in each step: blocks that a pass comes to, forward and back, and gathers `+n`."""
    told, found = list[str](), list[str]()
    with ParallelState.build(Layout.of(dp=world.size), world) as state:
        net = Recorded(told)
        with DataParallel({0: net}, state, sharding=MODES["fsdp"]) as weights:
            for n, block in enumerate(net.blocks):
                home = weights._home[block.weight]
                begin = home._begin

                def beginning(n: int = n, begin: Any = begin) -> Any:
                    told.append(f"+{n}")
                    assert sum(each.whole for each in weights.all_buckets) < 2
                    return begin()

                home._begin = beginning  # type: ignore[method-assign]
            adam = AdamW(weights, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
            for _ in range(2):
                weights.zero()
                weights.unshard(0)
                for _ in range(2):
                    weights.reduce(0)
                    net(torch.ones(2, WIDTH)).backward()
                weights.reshard(0)
                weights.finish()
                adam.step(1e-3)
                found.append(" ".join(told))
                told.clear()
    return found


def test_gathers_overlap_with_the_section_before_wherever_a_pass_turns(pool: Pool) -> None:
    """Of each pass but the first the two sections that it begins with are there; those of the next step come behind the
    update."""
    back_and_forth = "+2 1 +3 2 3 3 +1 2 +0 1 0 0 +2 1 +3 2 3 3 +1 2 +0 1 0"
    first, second = f"+0 +1 0 {back_and_forth} +0 +1", f"0 {back_and_forth} +0 +1"
    assert pool.run(2, gathers) == [[first, second]] * 2
