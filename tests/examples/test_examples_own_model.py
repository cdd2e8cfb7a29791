"""P8: a module and a loop of one's own train over tensor, pipeline and data parallel ranks, and equal one process."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from stretto.layout import Layout
from stretto.testing import Pool
from stretto.world import World

pytestmark = pytest.mark.gloo

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_model.py"
PROMISES = EXAMPLE.parents[1] / "docs" / "promises.md"


def example() -> ModuleType:
    """The file as a module, as a user would run it."""
    spec = importlib.util.spec_from_file_location("own_model", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["own_model"] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def losses(world: World, layout: Layout) -> list[float]:
    got: list[float] = example().train(world, layout, steps=6, dtype=torch.float64)
    return got


@pytest.mark.parametrize(
    "layout", [Layout.of(tp=2, pp=2, dp=2), Layout.of(tp=4), Layout.of(pp=5), Layout.of(dp=3)], ids=str
)
def test_a_model_of_ones_own_equals_one_process_in_any_layout(pool: Pool, layout: Layout) -> None:
    """Losses of six steps, each of which depends on all updates before it, to the rounding of fp64."""
    reference = pool.run(1, losses, Layout.of())[0]
    assert len(set(reference)) == 6
    for got in pool.run(layout.world, losses, layout):
        assert got == pytest.approx(reference, rel=1e-12)


def test_it_is_short() -> None:
    """The promise counts every line of the file that has something on it and is no comment: imports and `main`, too."""
    lines = [line for line in EXAMPLE.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    said = re.search(r"P8 .* in (\d+) lines", PROMISES.read_text())
    assert said is not None
    assert len(lines) == int(said[1])


def test_it_runs_as_its_first_lines_say() -> None:
    out = subprocess.run(
        [sys.executable, str(EXAMPLE), "4"], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    first, last = (float(word) for word in out.split("loss ")[1].split(" -> "))
    assert last < first / 2, out
