"""Loops and modules as people write them, over ranks, against one process. A gather brings nothing before its wait.

Faults to catch: weights in use outside of the sections that are read before they have come; a sum that is begun by the
number of forwards; a state_dict of weights that are on their way.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stretto.collectives import all_gather_into
from stretto.distributed import bucket, shard
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.testing import Pool
from stretto.train.optimizers import SGD
from stretto.world import World

pytestmark = pytest.mark.gloo

WIDTH, ROWS = 6, 8
SHARDED = ("zero1", "zero2", "fsdp")


class Late:
    """A gather that brings nothing of the others before it is waited for."""

    def __init__(self, out: Tensor, x: Tensor, axis: Any) -> None:
        self.out, self.came, mine = out, torch.empty_like(out), x.clone()
        all_gather_into(self.came, x, axis).wait()
        if axis.size > 1:
            out.fill_(torch.nan)[axis.rank * len(x) : (axis.rank + 1) * len(x)] = mine

    def wait(self) -> None:
        self.out.copy_(self.came)


class Net(nn.Module):
    """An embedding and a head around the blocks, and a block's matrix that is used once more behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(ROWS, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.again = self.blocks[1]
        self.head = nn.Linear(WIDTH, ROWS, bias=False)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        y = self.again(self.embed(ids))
        for block in self.blocks:
            y = y + torch.tanh(block(y))
        return F.cross_entropy(self.head(y), ids.roll(1))


def each_alone(net: nn.Module, parts: tuple[Tensor, ...]) -> None:
    for part in parts:
        (net(part) / len(parts)).backward()


def one_backward(net: nn.Module, parts: tuple[Tensor, ...]) -> None:
    torch.stack([net(part) for part in parts]).mean().backward()


def forwards_first(net: nn.Module, parts: tuple[Tensor, ...]) -> None:
    for loss in [net(part) / len(parts) for part in parts]:
        loss.backward()


def in_pairs(net: nn.Module, parts: tuple[Tensor, ...]) -> None:
    """Two forwards before each of two backwards."""
    for pair in (parts[:2], parts[2:]):
        (torch.stack([net(part) for part in pair]).sum() / len(parts)).backward()


Loop = Callable[[nn.Module, tuple[Tensor, ...]], None]
LOOPS: dict[str, tuple[Loop, int]] = {
    "each alone": (each_alone, 4),
    "one backward": (one_backward, 1),
    "one backward, said to be four": (one_backward, 4),
    "all forwards first": (forwards_first, 4),
    "in pairs": (in_pairs, 2),
}


def ids(step: int) -> Tensor:
    return torch.randint(0, ROWS, (16,), generator=torch.Generator().manual_seed(step))


def alone() -> dict[str, Tensor]:
    net = Net()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(3):
        sgd.zero_grad()
        torch.stack([net(part) for part in ids(step).chunk(8)]).mean().backward()
        sgd.step()
    return dict(net.state_dict())


def over_ranks(world: World, mode: str) -> dict[str, dict[str, Tensor]]:
    with ParallelState.build(Layout.of(dp=world.size), world) as state, pytest.MonkeyPatch.context() as patch:
        patch.setattr(bucket, "all_gather_into", Late)
        return {name: trained(mode, *loop, state) for name, loop in LOOPS.items()}


def trained(mode: str, run: Loop, backwards: int, state: ParallelState) -> dict[str, Tensor]:
    net, world = Net(), state.world
    with shard(net, state, sharding=mode, microbatches=backwards) as sharded:
        optimizer = sharded.optimizer(SGD(momentum=0.0, weight_decay=0.0))
        for step in range(3):
            run(net, ids(step).chunk(world.size)[world.rank].chunk(4))
            optimizer.step(0.1)
        with sharded.whole() if mode == "fsdp" else nullcontext():
            return {name: x.clone() for name, x in net.state_dict().items()}


@pytest.mark.parametrize("mode", ["none", *SHARDED])
def test_a_loop_is_that_of_one_process(pool: Pool, mode: str) -> None:
    want = alone()
    for found in pool.run(2, over_ranks, mode):
        for loop, weights in found.items():
            for name, tensor in want.items():
                torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-12, msg=f"{loop} {name}")


@pytest.mark.parametrize("mode", ["none", *SHARDED])
def test_weights_are_not_loaded_into_buckets(mode: str) -> None:
    """Masters and shards would not follow: under fsdp the process ended."""
    net = Net()
    before = {name: x.clone() for name, x in net.state_dict().items()}
    with ParallelState.build(Layout.of(), World.single()) as state:
        with shard(net, state, sharding=mode) as sharded:
            for part in (net, net.head):
                with sharded.whole(), pytest.raises(RuntimeError, match="before the module is handed over"):
                    part.load_state_dict(part.state_dict())
        net.load_state_dict(before)
