"""What would go wrong after hours is told before the first step, on all ranks.

Faults to catch: ranks that have lists of other lengths; a directory that lies on each node's own disk taken for one
that all share; a directory that cannot be written to found out at the first save.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stretto
from stretto.checkpoint import CheckpointError
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.testing import Pool
from stretto.world import World

pytestmark = pytest.mark.gloo

ROWS, WIDTH = 12, 6
SAID: dict[str, Any] = {"global_batch": ROWS}


def plain() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


def batch(n: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(n))
    return x, x.roll(1, 1).sin()


def _shorter(world: World) -> None:
    with ParallelState.build(Layout.of(dp=world.size), world) as state:
        data = [batch(n) for n in range(3 - world.rank)]
        with pytest.raises(ValueError, match="or not as many"):
            stretto.Trainer(plain(), state, data=data, loss=F.mse_loss, **SAID).fit(1, stop=bool)


def test_ranks_with_lists_of_other_lengths_are_told(pool: Pool) -> None:
    pool.run(2, _shorter)


def _apart(world: World, path: Path) -> None:
    here = Path.cwd()
    (own := path / f"node{world.rank}").mkdir()
    os.chdir(own)  # a directory of one name that is another on each node
    try:
        with ParallelState.build(Layout.of(dp=world.size), world) as state:
            said: dict[str, Any] = {"data": batch, "loss": F.mse_loss, **SAID}
            with stretto.Trainer(plain(), state, out="run", async_save=False, **said) as trainer:
                with pytest.raises(CheckpointError, match=r"rank 1: .*cannot be seen here: .* all ranks share"):
                    trainer.fit(1, stop=bool)
                assert trainer.step == 0
            (path / "file").touch()
            with stretto.Trainer(plain(), state, out=path, checkpoint_dir=path / "file", **said) as trainer:
                with pytest.raises(CheckpointError, match=r"cannot be written to, .*: File exists"):
                    trainer.fit(1, stop=bool)
                assert trainer.step == 0
            with stretto.Trainer(plain(), state, out=path / "shared", **said) as trainer:
                trainer.fit(1, stop=bool)
                assert [each.name for each in (path / "shared/checkpoints").iterdir()] == ["step-00000001"]
    finally:
        os.chdir(here)


def test_where_checkpoints_cannot_lie_is_told_before_the_first_step(pool: Pool, tmp_path: Path) -> None:
    pool.run(2, _apart, tmp_path)
