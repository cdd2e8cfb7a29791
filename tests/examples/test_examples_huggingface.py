"""A model of transformers, cut by a plan of names, trains under the `Trainer` and equals one process.

Catches: a parameter that is cut and drawn anew; a checkpoint under other names than the model's own.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_examples_own_model import Losses

from stretto.checkpoint import latest_complete
from stretto.checkpoint.index import Index
from stretto.layout import Layout
from stretto.testing import Pool
from stretto.world import World

pytestmark = pytest.mark.gloo

FILE = Path(__file__).parents[2] / "examples" / "huggingface.py"


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("huggingface_example", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses(world: World, layout: Layout, out: Path, steps: int) -> list[float]:
    heard = Losses()
    example().train(world, layout, steps, [heard], torch.float64, out=out, clip_grad=0.5)
    return heard.losses


def test_a_model_of_transformers_equals_one_process_and_resumes_in_another_layout(pool: Pool, tmp_path: Path) -> None:
    """Cut over tp and replicated, then resumed by one process; norms of transformers round to fp32 in between."""
    alone = pool.run(1, losses, Layout.of(), tmp_path / "alone", 5)[0]
    assert alone[-1] < alone[0]
    assert pool.run(4, losses, Layout.of(tp=2, dp=2), tmp_path / "cut", 3)[0] == pytest.approx(alone[:3], rel=1e-6)
    newest = latest_complete(tmp_path / "cut" / "checkpoints")
    assert newest is not None
    names = {name.removeprefix("model/") for name in Index(newest.path).tensors if name.startswith("model/")}
    assert names == {name for name, _ in example().model().named_parameters()}
    assert pool.run(1, losses, Layout.of(), tmp_path / "cut", 5)[0] == pytest.approx(alone[3:], rel=1e-6)


def test_it_is_short() -> None:
    assert len(FILE.read_text().splitlines()) <= 60
