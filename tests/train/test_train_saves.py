"""P16 and P18 under asynchronous saves, for every kind of sharding: stopped, or killed, and resumed is uninterrupted.

Each test names the fault that it catches.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stretto
from stretto.checkpoint import load
from stretto.checkpoint.index import Index
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.params import Slice
from stretto.schedule import DDP, FSDP, ZERO1, ZERO2
from stretto.testing import Pool
from stretto.train.saves import Saves
from stretto.world import World

pytestmark = pytest.mark.gloo

MODES = {"none": DDP, "zero1": ZERO1, "zero2": ZERO2, "fsdp": FSDP}
ROWS, WIDTH = 12, 6


def batch(n: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(n))
    return x, x.roll(1, 1).sin()


def trainer(state: ParallelState, out: Path, mode: str, **more: Any) -> stretto.Trainer:
    model = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, WIDTH))
    said: dict[str, Any] = {"global_batch": ROWS, "lr": 1e-2, "save_every": 2, "keep": 9, "bucket_mb": 0.0005}
    said |= {"sharding": MODES[mode], "out": out}
    return stretto.Trainer(model, state, data=batch, loss=F.mse_loss, **said | more)


def content(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    index, whole = Index(path), {}
    for tensor in index.tensors.values():
        whole[tensor.name] = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype))
    slices = [Slice(n, x, tuple(x.shape), (0,) * x.dim(), False) for n, x in whole.items()]
    load(path, slices, World.single())
    return whole


def both_ways(world: World, directory: Path) -> list[str]:
    """Uninterrupted, and resumed from the middle; what differs, by mode."""
    wrong = []
    with ParallelState.build(Layout.of(dp=world.size), world) as state:
        for mode in MODES:
            whole, parted = directory / mode / "whole", directory / mode / "parted"
            with trainer(state, whole, mode) as one:
                one.fit(6, stop=bool)
            if world.rank == 0:
                (parted / "checkpoints").mkdir(parents=True)
                shutil.copytree(whole / "checkpoints/step-00000004", parted / "checkpoints/step-00000004")
            with trainer(state, parted, "none" if mode == "fsdp" else "fsdp", resume=True) as other:
                assert other.step == 4
            with trainer(state, parted, mode, resume=True) as other:
                other.fit(6, stop=bool)
            if world.rank == 0:
                a, b = (content(each / "checkpoints/step-00000006") for each in (whole, parted))
                wrong += [f"{mode}: {name}" for name in a if not torch.equal(a[name], b[name])]
                wrong += [f"{mode}: a save is not told of"] * (told(whole) != [2, 4, 6])
    return wrong


def told(out: Path) -> list[int]:
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row["step"] for row in rows if "checkpoint_stall_seconds" in row]


def test_resumed_is_uninterrupted_to_the_bit(pool: Pool, tmp_path: Path) -> None:
    """Catches: a save that holds some of the next step; a run that ends before its last save is whole."""
    assert pool.run(2, both_ways, tmp_path, timeout=240) == [[], []]


def stop_on_failure(world: World, directory: Path) -> tuple[int, str]:
    """The step at which a run ends whose second save fails, and why."""
    with ParallelState.build(Layout.of(dp=world.size), world) as state, trainer(state, directory, "zero1") as run:
        failed = Saves.failed

        def soon(self: Saves) -> bool:
            return (run.step >= 4 and world.rank == 1) or bool(failed.__get__(self))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Saves, "failed", property(soon))
            finished = run.fit(100, stop=bool)
        return finished.step, "finished" if finished.finished else "stopped"


def test_a_rank_whose_save_failed_has_all_stop_at_the_next_step(pool: Pool, tmp_path: Path) -> None:
    """Catches: a full disk that is found out hours later, by the next save."""
    assert pool.run(2, stop_on_failure, tmp_path, timeout=60) == [(6, "stopped"), (6, "stopped")]
