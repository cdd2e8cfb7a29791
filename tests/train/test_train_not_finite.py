"""P22: a gradient that is no number is named, with the ranks whose loss is none.

Faults to catch: a rank that is not named; a parameter that is not named; a microbatch counted from another step; a step
that only some skip; a step that is skipped and not counted.
"""

from __future__ import annotations

import io
import logging
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.schedule.sharding import MODES
from stretto.testing import Pool
from stretto.train.not_finite import not_finite
from stretto.train.optimizers import SGD
from stretto.train.record import Listener, StepRecord
from stretto.train.step import StepResult
from stretto.train.trainer import Trainer
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
    with ParallelState.build(Layout.of(dp=2), world) as state:
        nan = float("nan")
        mine = result(1.0, a=nan, c=2.0) if world.rank == 0 else result(nan, b=nan)
        return not_finite(mine, state.axis("tp", "cp", "dp", "pp"))


@pytest.mark.parametrize("mode", ["none", "fsdp"])
def test_a_step_without_numbers_is_skipped_by_all_and_its_microbatch_named(pool: Pool, mode: str) -> None:
    """Rank 1's microbatch 1 of the second step has a row that is no number; the third goes on from the first."""
    for rows, said, weights, clean in pool.run(2, _skipping, mode):
        if rows:
            assert [row.get("skipped_steps") for row in rows] == [None, 1]
            assert [row["step"] for row in rows] == [1, 3]
            assert "first in microbatch 1 of rank 1: weight" in said
            assert "the update is skipped, 1 so far" in said
        assert torch.equal(weights, clean)


def _skipping(world: World, mode: str) -> tuple[list[dict[str, Any]], str, Tensor, Tensor]:
    """What rank 0 told, and the weight after three steps of which one is skipped, and after the two others."""
    rows: list[dict[str, Any]] = []
    heard = io.StringIO()

    class Rows(Listener):
        def stepped(self, record: StepRecord) -> None:
            rows.append({k: v for k, v in asdict(record).items() if v is not None})

    handler = logging.StreamHandler(heard)
    logging.getLogger("stretto.train.loop").addHandler(handler)
    found = []
    with ParallelState.build(Layout.of(dp=2), world) as state:
        for wrong in (True, False):
            batches = [torch.randn(8, 3, generator=torch.Generator().manual_seed(s)) for s in range(3)]
            batches[1][6] = float("nan")  # rows 4 to 7 are rank 1's, two of them a microbatch
            model = nn.Linear(3, 1, bias=False)
            nn.init.ones_(model.weight)
            with Trainer(
                model,
                state,
                data=batches if wrong else [batches[0], batches[2]],
                loss=lambda y, _: y.square().mean(),
                global_batch=8,
                micro_batch=2,
                optimizer=SGD(),
                sharding=MODES[mode],
                on_nonfinite="skip",
            ) as trainer:
                trainer.fit(3 if wrong else 2, [Rows()] if wrong else [], stop=bool)
                with trainer.assembly.weights.whole():
                    found.append(model.weight.detach().clone())
    logging.getLogger("stretto.train.loop").removeHandler(handler)
    return rows, heard.getvalue(), found[0], found[1]
