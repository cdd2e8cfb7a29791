"""Parameter groups by name, in every mode of sharding, against the groups of torch's optimizers on one process.

Faults to catch: a multiplier that is not applied; a decay of a group that is not used; an earlier group that wins; a
group that holds all that is stored together; a group without parameters that passes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from stacked_blocks import WIDTH, Block, drawn
from torch import Tensor, nn

from stretto.distributed import AdamWRule, Rule, SGDRule, shard
from stretto.distributed.optimizer import Optimizer
from stretto.layout import Layout
from stretto.notation.param_groups import parse_groups
from stretto.parallel_state import ParallelState
from stretto.testing import Pool
from stretto.train.optimizers import Lion
from stretto.world import World

pytestmark = pytest.mark.gloo

STEPS, LR = 3, 1e-2
GROUPS = "*.bias|scale: weight_decay=0.3; layers.*: lr=0.5; *.down.*: weight_decay=0, lr=2"
RULES: dict[str, tuple[Rule, Callable[[list[dict[str, object]]], torch.optim.Optimizer]]] = {
    "adamw": (
        AdamWRule((0.9, 0.95), 1e-4, 0.1),
        lambda groups: torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.1),
    ),
    "sgd": (SGDRule(0.8, 0.1), lambda groups: torch.optim.SGD(groups, lr=LR, momentum=0.8, weight_decay=0.1)),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.scale = nn.Parameter(torch.zeros(WIDTH))
        drawn(self)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return (x * self.scale).square().mean()


def rows(step: int) -> Tensor:
    return torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(step)).double()


def alone(make: Callable[[list[dict[str, object]]], torch.optim.Optimizer]) -> dict[str, Tensor]:
    """One process: matrices that are stored together are parameters of their own, as torch's groups need them."""
    net, leaves = Net(), dict[str, Tensor]()
    for n, block in enumerate(net.layers):
        up, down = (half.detach().clone().requires_grad_() for half in block.both.weight.chunk(2))
        leaves |= {f"layers.{n}.up.weight": up, f"layers.{n}.down.weight": down, f"layers.{n}.bias": block.bias}
    leaves["scale"] = net.scale
    groups: list[dict[str, object]] = []
    for name, leaf in leaves.items():
        decay = 0.3 if leaf.dim() == 1 else 0.1
        lr = 0.5 * LR if name.startswith("layers") else LR
        decay, lr = (0.0, 2 * LR) if ".down." in name else (decay, lr)
        groups.append({"params": [leaf], "weight_decay": decay, "lr": lr})
    optimizer = make(groups)
    for step in range(STEPS):
        optimizer.zero_grad()
        x = rows(step)
        for n in range(3):
            up, down = leaves[f"layers.{n}.up.weight"], leaves[f"layers.{n}.down.weight"]
            x = x + torch.tanh(x @ up + leaves[f"layers.{n}.bias"]) @ down
        (x * net.scale).square().mean().backward()
        optimizer.step()
    return {name: leaf.detach() for name, leaf in leaves.items()}


@pytest.mark.parametrize("ranks", [1, 3])
def test_groups_are_those_of_torch(pool: Pool, ranks: int) -> None:
    for rule, (_, make) in RULES.items():
        want = alone(make)
        for found in pool.run(ranks, _train, rule):
            for mode, weights in found.items():
                for name, tensor in want.items():
                    torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-12, msg=f"{rule} {mode} {name}")


def test_a_group_without_parameters_is_named() -> None:
    said = r"no parameter has a name like \*embed\*: names are such as scale"
    with ParallelState.build(Layout.of(), World.single()) as state, shard(Net(), state) as sharded:  # noqa: SIM117
        with pytest.raises(ValueError, match=said):
            sharded.optimizer(Lion(groups=parse_groups("*bias: lr=2; *embed*: lr=2")))


def _train(world: World, rule: str) -> dict[str, dict[str, Tensor]]:
    found = {}
    with ParallelState.build(Layout.of(dp=world.size), world) as state:
        for mode in ("none", "zero1", "zero2", "fsdp"):
            net = Net()
            with shard(net, state, sharding=mode, bucket_mb=1e-3) as sharded:
                optimizer = sharded.optimizer(partial(Optimizer, rule=RULES[rule][0], groups=parse_groups(GROUPS)))
                for step in range(STEPS):
                    net(rows(step).chunk(world.size)[world.rank]).backward()
                    optimizer.step(LR)
                with sharded.whole():
                    found[mode] = {
                        part.name: part.view(item.param.data).clone()
                        for item in sharded.declared
                        for part in item.logical
                    }
    return found
