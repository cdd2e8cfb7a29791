"""Habits of loops around `DistributedDataParallel`: after `shard` they are right, or an error with a way out.

Faults to catch: ranks that each begin from weights of their own; buffers of each rank; a norm that counts what every
stage holds once for each; copies of other weights that count as one; `clip_grad_norm_` that clips nothing; weights
written to while they were whole; masters that do not follow `param.data`; gradients that `zero_grad` leaves; a sparse
gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stretto.checkpoint import latest_complete, load, save
from stretto.distributed import shard
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.schedule.sharding import MODES
from stretto.testing import Pool
from stretto.train.optimizers import SGD
from stretto.world import World

pytestmark = pytest.mark.gloo

WIDTH, ROWS = 6, 8
PLAIN = SGD(momentum=0.0)


class Net(nn.Module):
    """Around its blocks an embedding, and noise that it keeps."""

    def __init__(self, seed: int = 3, *, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(ROWS, WIDTH, sparse=sparse)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, ROWS)
        self.register_buffer("noise", torch.randn(WIDTH))
        self.register_buffer("mask", torch.rand(WIDTH) > 0.3)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        y = (self.embed(ids) + self.noise) * self.mask
        for block in self.blocks:
            y = y + torch.tanh(block(y))
        return F.cross_entropy(self.head(y), ids.roll(1))


def ids(step: int) -> Tensor:
    return torch.randint(0, ROWS, (12,), generator=torch.Generator().manual_seed(step))


def run(state: ParallelState, mode: str, net: nn.Module, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Norms of three steps, and the weights after them; clipped."""
    ranks, me = state.axis("dp", "cp").size, state.axis("dp", "cp").rank
    with shard(net, state, sharding=mode, **options) as sharded:
        optimizer, norms = sharded.optimizer(PLAIN, clip_grad=0.5), []
        for step in range(3):
            optimizer.zero_grad()
            net(ids(step).chunk(ranks)[me]).backward()
            norms.append(optimizer.step(0.1).item())
        with sharded.whole():
            return norms, {name: x.clone() for name, x in net.state_dict().items()}


def same(found: tuple[list[float], dict[str, Tensor]], want: tuple[list[float], dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(want[0], rel=1e-10)
    for name, tensor in want[1].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=0, atol=1e-12, msg=name)


def split(world: World, mode: str, make: Callable[[int], nn.Module]) -> tuple[list[float], dict[str, Tensor]]:
    with ParallelState.build(Layout.of(dp=world.size), world) as state:
        return run(state, mode, make(world.rank))


def unseeded(rank: int) -> nn.Module:
    return Net(rank)


def sparse(_rank: int) -> nn.Module:
    return Net(0, sparse=True)


@pytest.mark.parametrize("make", [unseeded, sparse])
@pytest.mark.parametrize("mode", list(MODES))
def test_all_ranks_begin_as_the_first_and_sparse_gradients_add_up(
    pool: Pool, mode: str, make: Callable[[int], nn.Module]
) -> None:
    class Mean(nn.Module):
        """What two ranks compute of their halves, on one."""

        def __init__(self) -> None:
            super().__init__()
            self.net = Net(0)

        def forward(self, ids: Tensor) -> Tensor:
            halves: list[Tensor] = [self.net(half) for half in ids.chunk(2)]
            return (halves[0] + halves[1]) / 2

    with ParallelState.build(Layout.of(), World.single()) as state:
        norms, weights = run(state, "none", Mean())
    for found in pool.run(2, split, mode, make):
        same(found, (norms, {name.removeprefix("net."): x for name, x in weights.items()}))


def stages(world: World, directory: Path, seeds: tuple[int, int]) -> list[tuple[list[float], dict[str, Tensor]]]:
    """The same module on both ranks of a pipeline, and a checkpoint of it."""
    with ParallelState.build(Layout.of(pp=2), world) as state:
        found = [run(state, mode, Net(seeds[world.rank])) for mode in MODES]
        net = Net(9)
        with shard(net, state) as sharded:
            optimizer = sharded.optimizer(PLAIN)
            save(directory, 1, optimizer.slices(), {}, world)
            load(latest_complete(directory), optimizer.slices(), world)
    return found


def test_what_every_stage_holds_counts_once(pool: Pool, tmp_path: Path) -> None:
    with ParallelState.build(Layout.of(), World.single()) as state:
        want = run(state, "none", Net())
    for ranks in pool.run(2, stages, tmp_path, (3, 3)):
        for found in ranks:
            same(found, want)
    with pytest.raises(ValueError, match=r"differ over the ranks of pp.*, but count as whole and the same there"):
        pool.run(2, stages, tmp_path, (3, 4))


def own_pipeline(world: World) -> float:
    """Other parameters on each rank, by other names: each counts."""
    with ParallelState.build(Layout.of(pp=2), world) as state:
        net = nn.ModuleDict({str(world.rank): nn.Linear(3, 3, bias=False)}).double()
        with shard(net, state) as sharded:
            net[str(world.rank)](torch.ones(1, 3).double()).sum().backward()
            return sharded.optimizer(PLAIN).step(0.1).item()


def test_stages_of_a_pipeline_of_ones_own_count_each(pool: Pool) -> None:
    assert pool.run(2, own_pipeline) == [pytest.approx(18**0.5)] * 2


def habits(world: World, mode: str) -> dict[str, str]:
    said = {}
    with ParallelState.build(Layout.of(dp=world.size), world) as state:
        net = Net()
        with shard(net, state, sharding=mode) as sharded:
            optimizer = sharded.optimizer(PLAIN)
            net(ids(0)).backward()
            for name in ("clip_grad_norm_", "clip_grad_value_"):
                with pytest.raises(RuntimeError) as error:
                    getattr(torch.nn.utils, name)(net.parameters(), 1.0)
                said[name] = str(error.value)
            said["shown"] = repr(net.head.bias.grad)
            optimizer.zero_grad()  # forgets the rows of step 0
            net(ids(1)).backward()
            norm = optimizer.step(0.1).item()
            assert all(p.grad is None for p in net.parameters())
            net(ids(1)).backward()
            try:
                with sharded.whole():
                    net.head.bias.data.mul_(2)
            except RuntimeError as lost:
                said["whole"] = str(lost)
        with shard(Net(), state) as sharded:
            sharded.module(ids(1)).backward()
            assert norm == pytest.approx(sharded.optimizer(PLAIN).step(0.1).item(), rel=1e-12)
    return said


@pytest.mark.parametrize("mode", list(MODES))
def test_what_would_be_lost_is_an_error(pool: Pool, mode: str) -> None:
    for said in pool.run(2, habits, mode):
        assert said["clip_grad_norm_"] == said["clip_grad_value_"]
        assert "clip them by `sharded.optimizer(..., clip_grad=)`" in said["clip_grad_norm_"]
        assert said["shown"] == f"<a gradient [{ROWS}] in a bucket of stretto>"
        # Where masters are weights that are whole, it is no more than it says.
        assert said.get("whole", "").startswith("the weights of head.bias were assigned" if mode == "fsdp" else "")


@pytest.mark.parametrize("mode", ["none", "zero1"])
def test_masters_notice_what_was_written_to_their_weights(mode: str) -> None:
    """In bf16 the next update would write the masters over it."""
    with ParallelState.build(Layout.of(), World.single()) as state:
        net = Net().bfloat16()
        with shard(net, state, sharding=mode) as sharded:
            optimizer = sharded.optimizer(PLAIN)
            for step in range(12):
                net(ids(step)).backward()
                optimizer.step(0.1)
            with sharded.whole():
                net.head.bias.data.clamp_(-0.01, 0.01)
            net(ids(0)).backward()
            with pytest.raises(RuntimeError, match=r"the weights of head\.bias were assigned or written"):
                optimizer.step(0.1)


def test_statistics_of_a_microbatch_are_told(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with ParallelState.build(Layout.of(), World.single()) as state, shard(net, state):
        assert "1 normalizes over the rows of one rank's microbatch" in caplog.text
