"""Several tensors between stages, of other dtypes, some without gradient, and of another length in each microbatch.

Each test names the fault that it catches.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.pipeline_parallel import Pipeline, Stage, TensorMeta
from stretto.pipeline_parallel.meta import Boundary
from stretto.schedule import schedule_for
from stretto.testing import Pool
from stretto.world import World

pytestmark = pytest.mark.gloo

NAMES, LENGTHS, STAGES, WIDTH = ("1f1b", "interleaved", "zbv"), (3, 1, 5, 2), 4, 6


class Part(nn.Module):
    """Takes and gives activations, a second stream in fp32, ids, and weights of the rows that have no gradient."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        torch.manual_seed(stage)
        self.mix, self.side = nn.Linear(WIDTH, WIDTH, dtype=torch.float64), nn.Linear(WIDTH, 2)

    def forward(self, passed: Any, rows: Tensor) -> Any:
        if passed is None:
            ids = torch.arange(len(rows))
            passed = rows, rows.float()[:, :2] * 0.5, ids, (rows[:, :1] > 0).to(torch.float64)
        x, y, ids, weight = passed
        x = torch.tanh(self.mix(x)) * weight + y.double().mean(1, keepdim=True) * ids[:, None]
        return x, y + self.side(x.float()), ids + 1, weight


class Last(Part):
    """The loss."""

    def forward(self, passed: Any, rows: Tensor) -> Any:
        x, y, ids, weight = super().forward(passed, rows)
        return (x * weight).square().sum() + y.double().sin().sum() + ids.sum()


def make(last: int, stage: int) -> Part:
    return Last(stage) if stage == last else Part(stage)


def boundary(_: int, rows: Tensor) -> Boundary:
    n = len(rows)
    return (
        TensorMeta((n, WIDTH), torch.float64),
        TensorMeta((n, 2), torch.float32),
        TensorMeta((n,), torch.int64),
        TensorMeta((n, 1), torch.float64, gradient=False),
    )


def microbatches() -> list[Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return [torch.randn(n, WIDTH, dtype=torch.float64, generator=drawn) for n in LENGTHS]


def every(world: World) -> dict[str, tuple[float, dict[str, Tensor]]]:
    found = {}
    with ParallelState.build(Layout.of(pp=2), world) as state:
        for name in NAMES:
            s = schedule_for(name, 2, len(LENGTHS))
            last = s.num_stages - 1
            pipeline = Pipeline(lambda k, last=last: make(last, k), s, state.axis("pp"), boundary)
            pipeline.step(microbatches())
            for p in pipeline.parameters():
                p.grad = None
            loss = pipeline.step(microbatches()[::-1])  # no message is announced any more, and all have other lengths
            grads = {f"{k}.{n}": p.grad for k, m in pipeline.modules.items() for n, p in m.named_parameters()}
            found[name] = loss.item(), grads
    return found


def test_gradients_are_those_of_one_process(pool: Pool) -> None:
    """Catches: a gradient handed to the tensor beside it; one that is sent for integers or for what has none; a
    receive of the length that the first step had."""
    ranks = pool.run(2, every)
    for name in NAMES:
        stages = schedule_for(name, 2, 1).num_stages
        whole = [make(stages - 1, k) for k in range(stages)]
        total = torch.zeros((), dtype=torch.float64)
        for rows in microbatches()[::-1]:
            x: Any = None
            for part in whole:
                x = part(x, rows)
            x.backward()
            total += x.detach()
        assert sum(rank[name][0] for rank in ranks) == pytest.approx(total.item())
        grads = {key: grad for rank in ranks for key, grad in rank[name][1].items()}
        expected = {f"{k}.{n}": p.grad for k, part in enumerate(whole) for n, p in part.named_parameters()}
        assert grads.keys() == expected.keys()
        for key, grad in grads.items():
            torch.testing.assert_close(grad, expected[key], rtol=1e-6, atol=1e-9, msg=f"{name} {key}")


def test_an_output_that_the_next_stage_does_not_expect() -> None:
    """It would be a message of another size: found before it is sent, with both in words."""
    stage = Stage(0, lambda _, rows: (rows, rows), None, output=lambda rows: boundary(1, rows))
    with pytest.raises(ValueError, match=r"stage 0 puts out \(\[3, 6\] of float64, \[3, 6\] of float64\), but the"):
        stage.forward(0, None, microbatches()[0])


class Breaks(Part):
    """Divides by zero in one microbatch, forward or back."""

    def forward(self, passed: Any, rows: Tensor) -> Any:
        x, *rest = super().forward(passed, rows)
        return (x * torch.inf if len(rows) == LENGTHS[2] else x, *rest)


@pytest.mark.parametrize("backward", [False, True])
def test_what_is_not_finite_names_stage_microbatch_and_action(backward: bool) -> None:
    """Catches: a check that looks at the first tensor of a tuple alone, or not at gradients."""
    s = schedule_for("zbv", 1, len(LENGTHS))

    class Back(Last):
        def forward(self, passed: Any, rows: Tensor) -> Any:
            loss = super().forward(passed, rows)
            poisoned = (passed[1] - passed[1].detach()).clamp(min=0).double().sum().sqrt()  # 0, of infinite slope
            return loss + poisoned if backward and len(rows) == LENGTHS[1] else loss

    def made(k: int) -> nn.Module:
        return Back(k) if k == 1 else Part(k) if backward else Breaks(k)

    with ParallelState.build(Layout.of(), World.single()) as state:
        pipeline = Pipeline(made, s, state.axis("pp"), boundary, check_finite=True)
        with pytest.raises(FloatingPointError) as caught:
            pipeline.step(microbatches())
    said = f"{caught.value} {' '.join(caught.value.__notes__)}"
    if backward:
        assert "gradient" in said
        assert "in 1I1: I of microbatch 1 in stage 1, on pipeline rank 0" in said
    else:
        assert "in 0F2: F of microbatch 2 in stage 0, on pipeline rank 0" in said
