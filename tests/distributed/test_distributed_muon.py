"""Muon: the published reference on one process, in every mode of sharding and over tensor-parallel ranks.

Faults to catch: a matrix orthogonalized in parts; the second of two matrices that are stored together left as it is; a
momentum without the look ahead; a block that comes back to another place; a result that only its owner has; an
embedding orthogonalized; second moments of matrices that are kept.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from stacked_blocks import WIDTH, Block, drawn
from torch import Tensor, nn

from stretto.arguments.schema import Arguments, BatchConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from stretto.distributed import AdamWRule, MuonRule, shard
from stretto.distributed.optimizer import Optimizer
from stretto.estimate import ledger
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.testing import Pool
from stretto.train.build import build
from stretto.verify import Comparison, against_reference
from stretto.world import World

pytestmark = pytest.mark.gloo

STEPS, LR, DECAY, BETA = 3, 1e-2, 0.1, 0.9
ADAMW = AdamWRule((0.9, 0.95), 1e-4, DECAY)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.wide = nn.Linear(WIDTH, 3 * WIDTH)
        drawn(self)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.layers:
            x = block(x)
        y: Tensor = torch.tanh(self.wide(x)).square().mean()
        return y


def tokens(step: int) -> Tensor:
    return torch.randint(11, (12, 4), generator=torch.Generator().manual_seed(step))


def newton_schulz(g: Tensor) -> Tensor:
    """As published: kellerjordan.github.io/posts/muon."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def alone() -> dict[str, Tensor]:
    net = Net()
    matrices = [*(block.both.weight for block in net.layers), net.wide.weight]
    others = [p for p in net.parameters() if all(p is not m for m in matrices)]
    adamw = torch.optim.AdamW(
        [{"params": [p], "weight_decay": DECAY * (p.dim() > 1)} for p in others], lr=LR, betas=(0.9, 0.95), eps=1e-4
    )
    buffers = [torch.zeros_like(m) for m in matrices]
    for step in range(STEPS):
        net.zero_grad()
        net(tokens(step)).backward()
        adamw.step()
        with torch.no_grad():
            for matrix, buffer in zip(matrices, buffers, strict=True):
                assert matrix.grad is not None
                buffer.lerp_(matrix.grad, 1 - BETA)
                update = matrix.grad.lerp(buffer, BETA)
                halves = update.chunk(2) if matrix is not net.wide.weight else [update]
                moved = torch.cat([newton_schulz(half) * 0.2 * max(half.shape) ** 0.5 for half in halves])
                matrix.mul_(1 - LR * DECAY).sub_(LR * moved)
    return {name: p.detach() for name, p in net.named_parameters()}


@pytest.mark.parametrize("ranks", [1, 3])
def test_it_is_the_published_one_in_every_mode(pool: Pool, ranks: int) -> None:
    want = alone()
    kept: dict[str, set[str]] = {}
    for found in pool.run(ranks, _train):
        for mode, (weights, state) in found.items():
            kept.setdefault(mode, set()).update(state)
            for name, tensor in want.items():
                torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-10, msg=f"{mode} {name}")
    for state in kept.values():
        assert "exp_avg_sq/embedding.weight" in state
        assert not {"exp_avg_sq/wide.weight", "exp_avg_sq/layers.0.up.weight"} & state


@pytest.mark.parametrize(("mode", "dp"), [("none", 1), ("zero1", 2), ("fsdp", 2)])
def test_a_model_that_is_cut_equals_one_process(pool: Pool, mode: str, dp: int) -> None:
    """Over tp: q, k and v in one matrix with k and v in copies, gate and up in one, rows that are not cut equally."""
    for found in pool.run(2 * dp, _compare, example(2, dp, mode)):
        assert not found.unequal
        assert not found.failures, [f"{d.name}: {d.error:.1e}" for d in found.failures[:5]]


@pytest.mark.parametrize("mode", ["none", "zero1", "fsdp"])
def test_the_ledger_is_what_lives(mode: str) -> None:
    """On the last of the data-parallel ranks, which has the most."""
    args = example(1, 3, mode)
    with ParallelState.inspect(Layout.of(dp=3), 2) as state:
        built = build(args, state)
        live = sum(t.nbytes for each in built.optimizer.state.values() for t in each)  # type: ignore[attr-defined]
        built.weights.close()
    assert ledger(args, 0).optimizer == live
    assert live < ledger(replace(args, optimizer=OptimizerConfig()), 0).optimizer


def example(tp: int, dp: int, mode: str) -> Arguments:
    return Arguments(
        model=ModelConfig(layers=2, hidden=16, heads=4, kv_heads=1, head_dim=4, ffn=24, vocab=53),
        parallel=ParallelConfig(tp=tp, dp=dp, sequence_parallel=tp > 1, bucket_mb=0.005, sharding=mode),  # type: ignore[arg-type]
        batch=BatchConfig(seq_len=8, micro_batch=1, global_batch=2 * dp),
        optimizer=OptimizerConfig(optimizer="muon", lr=1e-2, clip_grad=0.5),
        run=RunConfig(dtype="fp64", timeout=30.0),
    )


def _compare(world: World, args: Arguments) -> Comparison:
    p = args.parallel
    return against_reference(args, Layout.of(tp=p.tp, dp=p.dp or 1), world)


def _train(world: World) -> dict[str, tuple[dict[str, Tensor], set[str]]]:
    found = {}
    with ParallelState.build(Layout.of(dp=world.size), world) as state:
        for mode in ("none", "zero1", "zero2", "fsdp"):
            net = Net()
            with shard(net, state, sharding=mode, bucket_mb=1e-3) as sharded:
                optimizer = sharded.optimizer(partial(Optimizer, rule=MuonRule(ADAMW, BETA)))
                for step in range(STEPS):
                    net(tokens(step).chunk(world.size)[world.rank]).backward()
                    optimizer.step(LR)
                with sharded.whole():
                    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
                found[mode] = weights, {piece.name for piece in optimizer.inner.slices()}
    return found
