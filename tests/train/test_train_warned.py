"""A warning to all processes of a run while the first step starts some, such as compilers: the run hears it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stretto
from stretto.testing import Fresh

pytestmark = pytest.mark.gloo


class Compiling(nn.Module):
    """Starts a process, as a compiler is started, that gets the warning of its whole process group while it works."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.left = nn.Linear(4, 1), 1

    def forward(self, x: Tensor) -> Tensor:
        if self.left:
            self.left -= 1
            subprocess.run(["sh", "-c", "kill -USR1 0; exit 0"], check=True)
        y: Tensor = self.inner(x)
        return y


def trained(out: str) -> int:
    """The step after which the run stopped."""
    with stretto.initialize() as world, stretto.ParallelState.build(stretto.Layout.of(), world) as state:
        data = [(torch.ones(4, 4), torch.zeros(4, 1))]
        trainer = stretto.Trainer(Compiling(), state, data=data, loss=F.mse_loss, global_batch=4, out=out)
        return trainer.fit(50).step


def test_what_the_first_step_starts_outlives_a_warning_that_the_run_hears(fresh: Fresh, tmp_path: Path) -> None:
    """Catches: a compiler that the warning ends, and the first step with it; a warning that nobody hears."""
    ended = fresh.run(trained, str(tmp_path / "run"))
    assert 1 <= ended.code < 50, ended.err
    assert "Traceback" not in ended.err
