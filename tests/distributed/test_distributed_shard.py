"""A user's own module in an ordinary loop, against the same loop on one process.

Faults to catch: a sum over the ranks in the place of a mean; a frozen parameter that moves; gradients of a step that
stay for the next; a declaration that is overwritten.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stretto.distributed import shard
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.params import Init, ParamSpec, collect, declare
from stretto.testing import Pool
from stretto.train.optimizers import SGD, AdamW
from stretto.world import World

pytestmark = pytest.mark.gloo

ROWS, WIDTH, STEPS = 12, 6, 3


def model() -> nn.Module:
    torch.manual_seed(3)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)]
    net = nn.Sequential(*layers, nn.Linear(WIDTH, 1, bias=False)).double()
    net[1][0].weight.requires_grad_(False)
    return net


def rows(step: int) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(step)).double()


def alone() -> tuple[dict[str, Tensor], list[float]]:
    net, norms = model(), []
    moving = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in moving if p.dim() > 1]},
        {"params": [p for p in moving if p.dim() == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.1)
    for step in range(STEPS):
        adam.zero_grad()
        net(rows(step)).square().mean().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(moving, 0.2).item())
        adam.step()
    return {name: p.detach() for name, p in net.named_parameters()}, norms


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_ordinary_loop_is_that_of_one_process(pool: Pool, ranks: int) -> None:
    want, want_norms = alone()
    for found in pool.run(ranks, _train):
        for mode, (weights, norms) in found.items():
            assert norms == pytest.approx(want_norms, rel=1e-10), mode
            for name, tensor in want.items():
                torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-12, msg=f"{mode} {name}")


def test_what_would_part_replicas_or_end_the_process_is_an_error(pool: Pool) -> None:
    """An update from gradients that nobody summed; a state_dict of weights that have no memory."""
    for early, unread in pool.run(2, _misused):
        assert "finish() of the weights comes before step()" in early
        assert "take the state_dict within `with sharded.whole():`" in unread


def _misused(world: World) -> tuple[str, str]:
    net = model()
    with ParallelState.build(Layout.of(dp=world.size), world) as state, shard(net, state) as sharded:
        optimizer = sharded.optimizer(SGD(momentum=0.0))
        net(rows(0)).mean().backward()
        with pytest.raises(RuntimeError) as early:
            optimizer.inner.step(0.1)
        optimizer.step(0.1)
        with pytest.raises(RuntimeError) as unread:
            net.state_dict()
        with sharded.whole():
            assert len(net.state_dict()) == len(list(net.parameters()))
    return str(early.value), str(unread.value)


@pytest.mark.parametrize("mode", ["none", "zero1", "zero2", "fsdp"])
def test_an_optimizer_of_torch_is_an_error_at_its_first_step(mode: str) -> None:
    """It sees no gradients. So is a loop that never updates. Catches: one over other parameters that is rejected too;
    a hook that outlives the weights."""
    net, other = model(), nn.Linear(2, 2)
    with ParallelState.build(Layout.of(), World.single()) as state:
        with shard(net, state, sharding=mode) as sharded:
            torch.optim.SGD(other.parameters(), lr=0.1).step()
            net(rows(0)).mean().backward()
            with pytest.raises(
                RuntimeError, match=r"AdamW holds 0.0.weight.*trains nothing; take `optimizer = sharded"
            ):
                torch.optim.AdamW(net.parameters()).step()
            with torch.no_grad():
                net(rows(0))
            with pytest.raises(RuntimeError, match=r"the 1 backward.* were not followed by an update"):
                net(rows(0))
            sharded.optimizer(SGD(momentum=0.0)).step(0.1)
            net(rows(0))
        torch.optim.AdamW(net.parameters()).step()
        with pytest.raises(ValueError, match="nothing to train"):
            shard(net.requires_grad_(False), state)


def test_what_is_declared_stays_so() -> None:
    net = nn.Linear(3, 3)
    declare(net, "weight", ParamSpec((3, 3), Init(), weight_decay=False))
    with ParallelState.build(Layout.of(), World.single()) as state, shard(net, state):
        assert [item.weight_decay for item in collect(net)] == [False, False]
        with pytest.raises(ValueError, match="take one of none, zero1, zero2, fsdp"):
            shard(net, state, sharding="zero9")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *, more: Tensor | None = None) -> Any:
        inner = torch.tanh(self.inner(x))
        y = x + self.outer(inner)
        return {"y": y if more is None else y + more, "inner": inner}


class Unlike(nn.Module):
    """Blocks in ways in which their inputs do not tell when the backward comes to them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.way, self.first, self.blocks = way, nn.Linear(WIDTH, WIDTH), nn.ModuleList(Block() for _ in range(3))
        self.double()

    def forward(self, x: Tensor) -> dict[str, Any]:
        inner: list[Tensor] = []
        if self.way == "towers":  # none takes what another put out
            y = self.first(x)
            for block in self.blocks:
                y = y + block(x)["y"]
            return {"y": y, "inner": inner}
        y = self.first(x)
        for block in self.blocks:
            if self.way == "reentrant":  # which runs it without a graph
                y = checkpoint(lambda y, block=block: block(y)["y"], y, use_reentrant=True)
            else:
                out = block(x=y, more=x)
                y, inner = out["y"], [*inner, out["inner"]]
        return {"inner": inner, "y": y}


@pytest.mark.parametrize("way", ["by name", "towers", "reentrant"])
def test_sections_are_whole_whatever_they_hand_on(pool: Pool, way: str) -> None:
    """Two forwards before each backward; a dictionary out, with tensors from within the blocks."""
    net = Unlike(way)
    loss_of(net, rows(0), way).backward()
    want = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    for norm, moved in pool.run(2, _moved, way):
        assert norm == pytest.approx(want.norm().item(), rel=1e-10)
        torch.testing.assert_close(moved, want, rtol=0, atol=1e-12)


def loss_of(net: nn.Module, x: Tensor, way: str) -> Tensor:
    outs = [net(x), *([net(2 * x)] if way != "reentrant" else [])]  # whose backward is one for each forward
    found = [out["y"].square().mean() + sum(0.3 * inner.mean() for inner in out["inner"]) for out in outs]
    return torch.stack(found).sum()


def _moved(world: World, way: str) -> tuple[float, Tensor]:
    """The gradient's norm, and how far a step of 1 against it moved the parameters."""
    net = Unlike(way)
    before = torch.cat([p.detach().flatten() for p in net.parameters()])
    with ParallelState.build(Layout.of(dp=world.size), world) as state, shard(net, state) as sharded:
        optimizer = sharded.optimizer(SGD(momentum=0.0))
        loss_of(net, rows(0).chunk(world.size)[world.rank], way).backward()
        norm = optimizer.step(1.0).item()
        with sharded.whole():
            return norm, before - torch.cat([p.detach().flatten() for p in net.parameters()])


def _train(world: World) -> dict[str, tuple[dict[str, Tensor], list[float]]]:
    found = {}
    with ParallelState.build(Layout.of(dp=world.size), world) as state:
        for mode in ("none", "zero1", "zero2", "fsdp"):
            net, norms = model(), []
            with shard(net, state, sharding=mode, microbatches=2, bucket_mb=1e-4) as sharded:
                optimizer = sharded.optimizer(AdamW(eps=1e-4), clip_grad=0.2)
                for step in range(STEPS):
                    for microbatch in rows(step).chunk(world.size)[world.rank].chunk(2):
                        (net(microbatch).square().mean() / 2).backward()
                    norms.append(optimizer.step(1e-2).item())
                with sharded.whole():
                    found[mode] = {name: p.detach().clone() for name, p in net.named_parameters()}, norms
    return found
