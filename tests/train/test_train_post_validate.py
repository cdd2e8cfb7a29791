"""Updates before the norm is known are, in the end, those that wait for it: bit for bit, whatever was taken back.

Each test names the fault that it catches.

Faults to catch: a step in vain that adds to the gradients of the one before; moments that do not follow the weights;
weights of which the update is made twice; an update that is proven when its gradients are gone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stretto.arguments.elsewhere import validated_in
from stretto.arguments.schema import Arguments, BatchConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from stretto.layout import Layout
from stretto.schedule import GENERATORS
from stretto.testing import Pool
from stretto.train.post_validate import PostValidated
from stretto.verify import build, random_batch, random_weights
from stretto.world import World

pytestmark = pytest.mark.gloo

ARGS = Arguments(
    model=ModelConfig(layers=4, hidden=16, heads=2, vocab=32, dropout=0.1),
    batch=BatchConfig(seq_len=8, micro_batch=1, global_batch=4),
    run=RunConfig(deterministic=True),
)
NEVER, ALWAYS = 1e9, 1e-3
LIMITS = (NEVER, NEVER, ALWAYS, ALWAYS, NEVER, NEVER, NEVER, ALWAYS)
"""Of the norm, step by step: steps 3 and 8 are taken back; 4 is clipped but waits, since 3 was."""


def trained(
    world: World, name: str, dp: int, sharding: str, dtype: str, optimizer: str, post_validate: bool
) -> dict[str, Any]:
    """Losses and norms, all that an update leaves on this rank, and how many were taken back."""
    pp, made = world.size // dp, GENERATORS[name]
    v = made.stages
    layout = Layout.of(pp=pp, dp=dp, vpp=v, shape=made.shape if v > 1 else "loop")
    parallel = ParallelConfig(pp=pp, dp=dp, schedule=name, vpp=v, sharding=sharding)  # type: ignore[arg-type]
    config = OptimizerConfig(post_validate=post_validate, optimizer=optimizer)  # type: ignore[arg-type]
    args = replace(ARGS, parallel=parallel, optimizer=config, run=replace(ARGS.run, dtype=dtype))  # type: ignore[arg-type]
    args = validated_in(args, layout).args
    with build(args, layout, world) as session:
        session.load_full(random_weights(session, 0))
        stepper = session.built.stepper
        results = []
        for step, limit in enumerate(LIMITS):
            stepper.clip_grad = limit
            results.append(stepper.step(session.microbatches(random_batch(args, step)), 1e-2))
        stepper.settle()
        session.built.weights.settle()
        optimizer: Any = stepper.optimizer
        left: list[Tensor] = [*optimizer.masters, *(flat for flats in optimizer.state.values() for flat in flats)]
        left += [p.detach() for stage in session.built.stages.values() for p in stage.parameters()]
        return {
            "figures": [(r.loss.item(), r.grad_norm.item(), r.votes.item()) for r in results],
            "left": [each.clone() for each in left],
            "steps": optimizer.steps,
            "taken back": stepper.taken_back if isinstance(stepper, PostValidated) else None,
        }


@pytest.mark.parametrize(
    ("name", "ranks", "dp", "sharding", "dtype", "optimizer"),
    [
        ("1f1b", 2, 1, "none", "fp32", "adamw"),
        ("zbv", 2, 1, "none", "bf16", "adamw"),
        ("zb-h1", 4, 2, "zero1", "bf16", "adamw"),
        ("zb-h2", 2, 1, "none", "bf16", "lion"),
        ("interleaved", 1, 1, "none", "fp32", "adamw"),
    ],
)
def test_it_is_the_update_that_waits(
    pool: Pool, name: str, ranks: int, dp: int, sharding: str, dtype: str, optimizer: str
) -> None:
    """Catches: moments, masters or weights that are not those of an update made once; a step under way that leaves
    gradients of wrong weights, or spoils those that the update is made of once more; a count of steps that goes on; the
    limit of the next step; a result that is never filled."""
    waiting = pool.run(ranks, trained, name, dp, sharding, dtype, optimizer, False)
    early = pool.run(ranks, trained, name, dp, sharding, dtype, optimizer, True)
    for one, other in zip(waiting, early, strict=True):
        assert one["taken back"] is None
        assert other["taken back"] == 2
        assert other["steps"] == one["steps"] == len(LIMITS)
        assert other["figures"] == one["figures"]
        assert len(other["left"]) == len(one["left"])
        assert all(torch.equal(a, b) for a, b in zip(one["left"], other["left"], strict=True))


def test_gradients_in_pieces_are_rejected() -> None:
    """There is no copy of what other ranks hold."""
    parallel = ParallelConfig(dp=2, sharding="fsdp")
    args = replace(ARGS, optimizer=OptimizerConfig(post_validate=True), parallel=parallel)
    with pytest.raises(ValueError, match="sharding = fsdp"):
        validated_in(args, Layout.of(dp=2))
