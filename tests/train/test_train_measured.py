"""`--schedule auto` on what the stages really take: one order on all ranks, and the update of any other schedule.

Each test names the fault that it catches.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stretto
from stretto.layout import Layout
from stretto.notation.profile import ProfileWindow
from stretto.parallel_state import ParallelState
from stretto.schedule import DDP, FSDP, Cost, makespan, simulate
from stretto.schedule.measured import Measured
from stretto.testing import Pool
from stretto.train.assemble import StageSpec
from stretto.train.measured import StepTimeline
from stretto.train.record import Listener, StepRecord
from stretto.world import World

pytestmark = pytest.mark.gloo

ROWS, WIDTH, STEPS, SLOW = 8, 6, 6, 2


class Layers(nn.Module):
    """Four layers over all stages; stage 2 takes its time."""

    def __init__(self, index: int, count: int) -> None:
        super().__init__()
        self.slow = index == SLOW
        held = range(4 * index // count, 4 * (index + 1) // count)
        self.layers = nn.ModuleDict({str(n): self.layer(n) for n in held})

    @staticmethod
    def layer(n: int) -> nn.Linear:
        torch.manual_seed(n)
        return nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.slow:
            time.sleep(0.02)
        for layer in self.layers.values():
            x = torch.tanh(layer(x))
        return x


def make(spec: StageSpec) -> nn.Module:
    return Layers(spec.index, spec.count)


def batch(n: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    return x, x.roll(1, 1).sin()


def trained(world: World, layout: Layout, schedule: str, out: str) -> dict[str, Any]:
    """Losses, the order at the end, the costs of this rank."""
    losses: list[float] = []

    class Heard(Listener):
        everywhere = True

        def stepped(self, record: StepRecord) -> None:
            losses.append(record.loss)

    sharding = FSDP if layout.size("dp") > 1 else DDP
    said: dict[str, Any] = {"dtype": torch.float64, "lr": 1e-2, "schedule": schedule, "sharding": sharding}
    with ParallelState.build(layout, world) as state:
        trainer = stretto.Trainer(
            make, state, data=batch, loss=F.mse_loss, global_batch=ROWS, micro_batch=1, boundary=(1, WIDTH), **said
        )
        with trainer:
            stepper, tuner = trainer.assembly.stepper, trainer.assembly.tuner
            first = str(stepper.executor.program)
            window = StepTimeline(ProfileWindow.read("steps=5:7"), stepper, Path(out) / schedule)
            trainer.fit(STEPS, [Heard()], stop=bool, before_step=window.begin if state.axis("pp").size > 1 else bool)
            if state.axis("pp").size > 1:
                window.finish()
            changed = first != str(stepper.executor.program)
            return {
                "losses": losses,
                "changed": changed,
                "program": str(stepper.executor.program),
                "cost": None if tuner is None else tuner.cost,
            }


def test_the_order_follows_what_was_measured_and_the_update_does_not(pool: Pool, tmp_path: Path) -> None:
    """Catches: ranks that search for themselves (their orders differ, or a reduction hangs); visits of the former
    order under sharded weights; costs of the equal stages; records that lack a rank."""
    layout = Layout.of(pp=2, dp=2, vpp=2, shape="v")
    tuned = pool.run(4, trained, layout, "auto", str(tmp_path))
    plain = pool.run(4, trained, layout, "zbv", str(tmp_path))
    single = pool.run(1, trained, Layout.of(), "1f1b", str(tmp_path))[0]
    cost = tuned[0]["cost"]
    assert isinstance(cost, Cost)
    assert isinstance(cost.forward, tuple)
    assert min(cost.forward[SLOW], 0.02) == 0.02
    assert cost.hop > 0
    for rank in tuned:
        assert rank["changed"]
        assert rank["cost"] == cost
        assert rank["program"] == tuned[0]["program"]
    assert not any(rank["changed"] or rank["cost"] for rank in plain)
    assert tuned[0]["losses"] == plain[0]["losses"]  # bit for bit
    assert tuned[0]["losses"] == pytest.approx(single["losses"], rel=1e-9)
    kept = Measured.read((tmp_path / "auto" / "timeline.json").read_text(), "timeline.json")
    assert len(kept.steps) == 2
    assert min(makespan(step) for step in kept.steps) >= 4 * 0.02
    assert makespan(simulate(kept.schedule, kept.cost())) >= 4 * 0.02
    assert json.loads((tmp_path / "zbv" / "timeline.json").read_text())["measured"]["hop"] > 0
