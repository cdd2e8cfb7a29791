"""P22: a gradient that is no number is named, with the ranks whose loss is none.

Faults to catch: a rank that is not named; a parameter that is not named.
"""

from __future__ import annotations

import pytest
import torch

from stretto.testing import Pool
from stretto.train.not_finite import not_finite
from stretto.train.step import StepResult
from stretto.world import Axis, World

pytestmark = pytest.mark.gloo


def result(loss: float, **norms: float) -> StepResult:
    zero = torch.zeros(())
    return StepResult(zero, zero, zero, torch.tensor(loss), (list(norms), torch.tensor([*norms.values()])))


def test_what_is_not_finite_is_named() -> None:
    alone, nan, inf = Axis.single("world", 5), float("nan"), float("inf")
    assert (
        not_finite(result(nan, a=1.0, b=nan, c=inf), alone) == "not finite: the loss of rank 5, the gradients of b, c"
    )
    assert not_finite(result(1.0, b=inf), alone) == "the gradient of b not finite"
    many = not_finite(result(1.0, **dict.fromkeys("abcde", nan)), alone)
    assert many == "the gradients of a, b, c and 2 more not finite"


def test_the_ranks_name_what_each_of_them_saw(pool: Pool) -> None:
    said = pool.run(2, _named)
    assert said == ["not finite: the loss of rank 1, the gradients of a, b"] * 2


def _named(world: World) -> str:
    from stretto.layout import Layout
    from stretto.parallel_state import ParallelState

    with ParallelState.build(Layout.of(dp=2), world) as state:
        nan = float("nan")
        mine = result(1.0, a=nan, c=2.0) if world.rank == 0 else result(nan, b=nan)
        return not_finite(mine, state.axis("tp", "cp", "dp", "pp"))
