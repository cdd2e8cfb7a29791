"""P8: a module and a loop of one's own train over tensor, pipeline and data parallel ranks, and equal one process."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

import stretto
from stretto.layout import Layout
from stretto.testing import Pool
from stretto.train.record import Listener, StepRecord
from stretto.world import World

pytestmark = pytest.mark.gloo

EXAMPLES = Path(__file__).parents[2] / "examples"


class Losses(Listener):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def stepped(self, record: StepRecord) -> None:
        self.losses.append(record.loss)


def example() -> ModuleType:
    """The file as a module, as a user would run it."""
    spec = importlib.util.spec_from_file_location("own_model", EXAMPLES / "own_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses(world: World, layout: Layout, out: Path, steps: int = 6) -> list[float]:
    own, heard = example(), Losses()
    data, dtype = partial(own.batch, dtype=torch.float64), torch.float64
    own.train(world, layout, steps, [heard], out=out, data=data, dtype=dtype)
    return heard.losses


@pytest.mark.parametrize(
    "layout",
    [Layout.of(tp=2, pp=2, dp=2), pytest.param(Layout.of(pp=5), marks=pytest.mark.nightly), Layout.of(dp=3)],
    ids=str,
)
def test_a_model_of_ones_own_equals_one_process_in_any_layout(pool: Pool, tmp_path: Path, layout: Layout) -> None:
    """Losses of six steps, each of which depends on all updates before it, to the rounding of fp64."""
    alone = pool.run(1, losses, Layout.of(), tmp_path / "alone")[0]
    assert len(set(alone)) == 6
    assert pool.run(layout.world, losses, layout, tmp_path / "cut", 4)[0] == pytest.approx(alone[:4], rel=1e-12)
    assert pool.run(1, losses, Layout.of(), tmp_path / "cut")[0] == pytest.approx(alone[4:], rel=1e-12), "resumed"


def test_they_are_short() -> None:
    """A user's model over three axes with checkpoints in 60 lines, a loop of one's own in 20, all counted."""
    lines = {name: len((EXAMPLES / name).read_text().splitlines()) for name in ("own_model.py", "own_loop.py")}
    assert lines["own_model.py"] <= 60
    assert lines["own_loop.py"] <= 20


def test_a_loop_of_ones_own_equals_one_process(torchrun: list[str]) -> None:
    """Its parts of the loss add up to that of one process. Catches: gradients that are not summed over the replicas.

    Ranks share one pipe, where a line's text is one write and, unbuffered, its end another: two texts may share a line.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    told = [
        subprocess.run(
            [*launcher, str(EXAMPLES / "own_loop.py")], capture_output=True, text=True, timeout=120, check=True, env=env
        ).stdout
        for launcher in ([sys.executable], torchrun)
    ]
    parts = [sum(map(float, re.findall(r"part of the loss (\d+\.\d{6})", text))) for text in told]
    assert parts[1] == pytest.approx(parts[0], rel=1e-4)
    assert 0 < parts[0] < 0.5


def test_the_public_face_is_what_the_examples_need() -> None:
    """Nothing is imported from within the library."""
    for name in ("own_model.py", "own_loop.py"):
        text = (EXAMPLES / name).read_text()
        assert "import stretto\n" in text
        assert "stretto." in text
        assert "from stretto" not in text
    assert {"Trainer", "Layout", "ParallelState", "initialize", "replicate", "declare"} <= set(dir(stretto))
