"""Loops and modules as people write them, over ranks, against one process. A gather brings nothing before its wait.

Faults to catch: weights in use outside of the sections that are read before they have come; a sum that is begun by the
number of forwards; a state_dict of weights that are on their way; a parameter that is thawed and
never moves; a gradient of the step before where there is none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stretto.checkpoint import latest_complete, load, save
from stretto.collectives import all_gather_into
from stretto.distributed import bucket, shard
from stretto.distributed.shard import SteppingOptimizer
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.schedule.sharding import MODES
from stretto.testing import Pool
from stretto.train.optimizers import SGD, AdamW
from stretto.world import World

pytestmark = pytest.mark.gloo

WIDTH, ROWS = 6, 8
SHARDED = tuple(mode for mode in MODES if mode != "none")


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


@pytest.mark.parametrize(("mode", "dp", "then", "ranks"), [("fsdp", 2, "zero1", 3), ("none", 3, "fsdp", 4)])
def test_a_checkpoint_of_a_mode_is_read_in_another(
    pool: Pool, tmp_path: Path, mode: str, dp: int, then: str, ranks: int
) -> None:
    went_on = pool.run(dp, saved, mode, tmp_path)
    for found in pool.run(ranks, resumed, then, tmp_path):
        for name, tensor in went_on[0].items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-12, msg=name)


def steps(net: nn.Module, optimizer: SteppingOptimizer, numbers: range) -> None:
    for step in numbers:
        each_alone(net, (ids(step),))  # all ranks have the same rows, and so any number of them the same mean
        optimizer.step(0.1)


def saved(world: World, mode: str, directory: Path) -> dict[str, Tensor]:
    net = Net()
    with ParallelState.build(Layout.of(dp=world.size), world) as state, shard(net, state, sharding=mode) as sharded:
        optimizer = sharded.optimizer(AdamW(eps=1e-3))
        steps(net, optimizer, range(2))
        save(directory, 2, optimizer.slices(), {"seen": 2}, world)
        steps(net, optimizer, range(2, 4))
        with sharded.whole():
            return {name: x.clone() for name, x in net.state_dict().items()}


def resumed(world: World, mode: str, directory: Path) -> dict[str, Tensor]:
    net = Net()
    for param in net.parameters():
        nn.init.zeros_(param)
    with ParallelState.build(Layout.of(dp=world.size), world) as state, shard(net, state, sharding=mode) as sharded:
        optimizer = sharded.optimizer(AdamW(eps=1e-3))
        assert load(latest_complete(directory), optimizer.slices(), world) == {"seen": 2}
        optimizer.loaded(2)
        steps(net, optimizer, range(2, 4))
        with sharded.whole():
            return {name: x.clone() for name, x in net.state_dict().items()}


class Branched(Net):
    """Ids below 4 take the head's way alone; the others go through a branch as well, and not through the last block."""

    def __init__(self, *, skips: bool) -> None:
        super().__init__()
        self.skips, self.branch = skips, nn.Linear(WIDTH, WIDTH).double()

    def forward(self, ids: Tensor) -> Tensor:
        y, apart = self.embed(ids), bool(ids[0] >= 4)
        for block in self.blocks[: -1 if apart and self.skips else None]:
            y = y + torch.tanh(block(y))
        return F.cross_entropy(self.head(y + self.branch(y) if apart else y), ids.roll(1))


def branched(world: World, mode: str) -> dict[str, Tensor]:
    net = Branched(skips=mode != "fsdp")  # under which all ranks gather the same sections
    parts = tuple(torch.tensor([[0, 1, 2], [5, 6, 4], [3, 2, 1], [1, 1, 0]]).chunk(world.size)[world.rank])
    with (
        ParallelState.build(Layout.of(dp=world.size), world) as state,
        shard(net, state, sharding=mode, microbatches=len(parts), allow_unused=True) as sharded,
    ):
        optimizer = sharded.optimizer(SGD(momentum=0.0, weight_decay=0.0))
        for _ in range(3):
            each_alone(net, parts)
            optimizer.step(0.1)
        with sharded.whole():
            return {name: x.clone() for name, x in net.state_dict().items()}


@pytest.mark.parametrize("mode", ["none", *SHARDED])
def test_what_some_ranks_alone_use_is_right_or_named(pool: Pool, mode: str) -> None:
    want = branched(World.single(), mode)
    for found in pool.run(4, branched, mode):
        for name, tensor in want.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-12, msg=name)
    net = Net()
    with ParallelState.build(Layout.of(), World.single()) as state, shard(net, state, sharding=mode) as sharded:
        optimizer = sharded.optimizer(SGD(momentum=0.0))
        net.head(torch.zeros(1, WIDTH).double()).sum().backward()
        with pytest.raises(RuntimeError, match=r"no gradient reached .*embed.weight.*allow_unused"):
            optimizer.step(0.1)


def written(head: nn.Module, _args: object) -> None:
    head.get_parameter("weight").detach().mul_(1)


ONES = torch.ones(ROWS, WIDTH).double()
MISUSES: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "load": (lambda net: net.load_state_dict({}), "before the module is handed over"),
    "load a part": (lambda net: net.get_submodule("head").load_state_dict({}), "before the module is handed over"),
    "copy": (copy.deepcopy, "take its state_dict within `with sharded.whole"),
    "cast": (lambda net: net.half(), "not moved or cast to torch.float16 on cpu"),
    "thaw": (lambda net: net.requires_grad_(True), "embed.weight had requires_grad=False"),
    "assign": (lambda net: setattr(net.get_parameter("head.weight"), "data", ONES), "the weights of head.weight were"),
    "write": (
        lambda net: net.get_submodule("head").register_forward_pre_hook(written),
        "the weights of head.weight were",
    ),
    "freeze": (lambda net: net.get_submodule("head").requires_grad_(False), "no gradient reached head.weight"),
}


@pytest.mark.parametrize("mode", ["none", *SHARDED])
def test_what_buckets_would_not_follow_is_an_error(pool: Pool, mode: str) -> None:
    """Under fsdp some of it ended the process, in other modes it was lost without a word."""
    for found, after in pool.run(2, misused, mode):
        for way, (_, want) in MISUSES.items():
            assert want in found.get(way, "")
        assert "sharded weights went with" in after if mode == "fsdp" else after == "right"


def misused(world: World, mode: str) -> tuple[dict[str, str], str]:
    said = {}
    with ParallelState.build(Layout.of(dp=world.size), world) as state:
        for way, (run, _) in MISUSES.items():
            net = Net()
            net.embed.requires_grad_(False)
            with shard(net, state, sharding=mode) as sharded:
                optimizer = sharded.optimizer(SGD(momentum=0.0))
                try:
                    run(net.double().to("cpu"))  # which changes nothing
                    net(ids(0)).backward()
                    optimizer.step(0.1)
                except RuntimeError as error:
                    said[way] = str(error)
                with pytest.raises(ValueError, match="handed over already"):
                    shard(net.blocks, state)
        try:
            net(ids(0))
        except RuntimeError as error:
            return said, str(error)
        with shard(net, state, sharding=mode):  # once more
            return said, "right"


def test_numbers_and_modules_that_are_none_are_rejected() -> None:
    with ParallelState.build(Layout.of(), World.single()) as state:
        for wrong in ({"microbatches": 0}, {"bucket_mb": 0.0}, {"keep": -1}):
            with pytest.raises(ValueError, match="a step has a backward or more"):
                shard(Net(), state, **wrong)  # type: ignore[arg-type]
        with torch.device("meta"), pytest.raises(ValueError, match=r"embed.weight.* lie on the meta device"):
            shard(Net(), state)
