"""The same pipelines on two GPUs over NCCL."""

from __future__ import annotations

from functools import partial

import pipeline_reference as pt
import pytest
import torch
from pipeline_reference import Model
from torch import nn

from stretto.pipeline_parallel import Executor, Link, OwnWeights, Stage, TensorMeta
from stretto.schedule import gpipe, lower, one_f_one_b
from stretto.testing import Pool
from stretto.world import World

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs"),
]

SCHEDULES = {"gpipe": gpipe, "1f1b": one_f_one_b, "v": pt.v_shape, "loop": partial(pt.looped, rounds=2)}


@pytest.mark.parametrize("two_ways", [False, True])
@pytest.mark.parametrize("m", [1, 2, 6])
@pytest.mark.parametrize("name", SCHEDULES)
def test_two_gpus_equal_one_process(gpus: Pool, name: str, m: int, two_ways: bool) -> None:
    """fp64, so that a right pipeline differs from the CPU by rounding alone, and 1e-10 sees any wrong one."""
    program = pt.program(SCHEDULES[name], 2, m)
    widths = ((3, 4), (4, 5, 4), (4, 4), (4, 2))[-program.num_stages :]
    outcomes = gpus.run(2, pt.run_step, Model(widths, device="cuda"), program, two_ways, timeout=120)
    pt.assert_equal_to_reference(outcomes, pt.reference(Model(widths), m), last_rank=program.placement[-1], tol=1e-10)


class Scale(nn.Module):
    """x -> w * x, from ones; on the last stage the mean."""

    def __init__(self, first: bool, last: bool, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((), 0.5))
        self.first, self.last, self.shape = first, last, shape

    def forward(self, x: torch.Tensor | None, microbatch: float) -> torch.Tensor:
        if x is None:
            x = torch.full(self.shape, microbatch, device=self.weight.device)
        y = self.weight * x
        return y.mean() if self.last else y


def _large(world: World, m: int, two_ways: bool) -> tuple[float, float]:
    """Messages of 256 MiB, which NCCL cannot buffer: every send really waits for its receive."""
    shape = (8192, 8192)
    axis = pt.pp_axis(world)
    link = Link(axis, world.device, pt.pairs(world) if two_ways else {})
    boundary = TensorMeta(shape, torch.float32) if world.rank else None
    stage = Stage(world.rank, Scale(world.rank == 0, world.rank == 1, shape).to(world.device), boundary)
    executor = Executor(lower(one_f_one_b(2, m)), world.rank, {world.rank: stage}, link, OwnWeights())
    batch = [float(i + 1) for i in range(m)]
    executor.step(batch)  # the first one connects and allocates
    stage.module.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # the host must not wait for the device anywhere in a step
    try:
        loss = executor.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return float(loss), float(stage.module.weight.grad)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # torch says that setting it is a prototype
@pytest.mark.parametrize("two_ways", [False, True])
def test_large_messages_neither_deadlock_nor_stall_the_host(gpus: Pool, two_ways: bool) -> None:
    m = 6
    (none, g0), (loss, g1) = gpus.run(2, _large, m, two_ways, timeout=120)
    total = m * (m + 1) / 2
    assert (none, loss) == (0.0, pytest.approx(0.25 * total, rel=1e-4))
    assert (g0, g1) == (pytest.approx(0.5 * total, rel=1e-4), pytest.approx(0.5 * total, rel=1e-4))
