"""Update rules on vectors: what torch's optimizers, or the published algorithm, make of the same gradients.

Faults to catch: a momentum that is not kept; a decay that is not decoupled; a sign of the gradient alone; an update in
bf16 where the state is; a state that is not written back; a scale that one of the moments does not see.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stretto.distributed import AdamWRule, DataParallel, LionRule, Optimizer, Rule, SGDRule
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.params import Init, ParamSpec, declare
from stretto.world import World

pytestmark = pytest.mark.gloo

LR, DECAY, SCALE, STEPS = 3e-2, 0.2, 0.5, 6


def gradient(step: int) -> Tensor:
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def with_torch(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Tensor:
    weight = nn.Parameter(gradient(99))
    optimizer = make([weight])
    for step in range(STEPS):
        weight.grad = SCALE * gradient(step)
        optimizer.step()
    return weight.detach()


def lion() -> Tensor:
    """Algorithm 2 of Chen et al., 2023."""
    weight, m = gradient(99), torch.zeros(7, 5, dtype=torch.float64)
    for step in range(STEPS):
        g = SCALE * gradient(step)
        c = 0.9 * m + (1 - 0.9) * g
        weight = weight - LR * (torch.sign(c) + DECAY * weight)
        m = 0.99 * m + (1 - 0.99) * g
    return weight


CASES = {
    "adamw": (
        AdamWRule((0.9, 0.95), 1e-4, DECAY),
        lambda: with_torch(lambda p: torch.optim.AdamW(p, lr=LR, betas=(0.9, 0.95), eps=1e-4, weight_decay=DECAY)),
    ),
    "sgd": (
        SGDRule(0.8, DECAY),
        lambda: with_torch(lambda p: torch.optim.SGD(p, lr=LR, momentum=0.8, weight_decay=DECAY)),
    ),
    "lion": (LionRule((0.9, 0.99), DECAY), lion),
}


@pytest.mark.parametrize("name", CASES)
def test_a_rule_is_the_published_one(name: str) -> None:
    rule, reference = CASES[name]
    torch.testing.assert_close(updated(rule), reference(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", CASES)
def test_moments_in_bf16_are_near(name: str) -> None:
    """The update is computed wide: what differs is the rounding of what is kept, 2^-9 of it; a sign may turn."""
    wide, near = updated(CASES[name][0]), updated(CASES[name][0], torch.bfloat16)
    apart = ((near - wide).abs() / LR).flatten()
    assert apart.median() < 0.01
    assert apart.max() > 1e-6 or name == "lion"


def updated(rule: Rule, moments: torch.dtype | None = None) -> Tensor:
    net = nn.Module()
    weight = declare(net, "weight", ParamSpec((7, 5), Init()), dtype=torch.float64)
    weight.data.copy_(gradient(99))
    with ParallelState.build(Layout.of(), World.single()) as state, DataParallel({0: net}, state) as weights:
        optimizer = Optimizer(weights, rule, moments=moments)
        assert {piece.tensor.dtype for piece in optimizer.slices()} == {torch.float64, moments or torch.float64}
        assert {piece.name for piece in optimizer.slices()} == {f"{k}/weight" for k in ("model", *rule.state)}
        for step in range(STEPS):
            weights.zero()
            weight.backward(gradient(step))
            weights.finish()
            optimizer.step(LR, torch.tensor(SCALE, dtype=torch.float64))
        return weight.detach().clone()
