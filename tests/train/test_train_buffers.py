"""Buffers of a user's own modules are in checkpoints: a resumed run is the uninterrupted one.

Faults to catch: buffers left out of a checkpoint; what is not persistent saved; ranks that begin with buffers of their
own; a save that sees what a later forward has done.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stretto
from stretto.checkpoint import CheckpointError
from stretto.checkpoint.index import Index
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.testing import Pool
from stretto.train.buffers import Buffers
from stretto.world import World

pytestmark = pytest.mark.gloo

WIDTH = 6


class Centred(nn.Module):
    """Subtracts a running mean, as batch norm does while it is evaluated."""

    mean: Tensor
    seen: Tensor
    even: Tensor

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.register_buffer("mean", torch.randn(width))
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("even", torch.tensor([True]))
        self.register_buffer("last", torch.zeros(width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = self.mean.lerp(x.detach().mean(0), 0.1)  # another tensor each time
            self.seen += 1
            self.even.logical_not_()
        y: Tensor = self.linear(x - self.mean)
        return y


def batch(n: int) -> tuple[Tensor, Tensor]:
    rows = torch.randn((4, 2 * WIDTH), generator=torch.Generator().manual_seed(n))
    return rows[:, :WIDTH], rows[:, WIDTH:]


def trainer(state: ParallelState, model: Any, out: Path, **more: Any) -> stretto.Trainer:
    files = {"out": out, "save_every": 2}
    return stretto.Trainer(model, state, data=batch, loss=F.mse_loss, global_batch=4, lr=0.1, **files, **more)


def run(out: Path, steps: int, **more: Any) -> dict[str, Tensor]:
    """Weights and buffers after so many steps."""
    torch.manual_seed(0 if "resume" not in more else 1)
    model = Centred()
    with ParallelState.build(Layout.of(), World.single()) as state, trainer(state, model, out, **more) as made:
        made.fit(steps, stop=bool)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("async_save", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, async_save: bool) -> None:
    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "cut", 4, async_save=async_save)
    again = run(tmp_path / "cut", 6, async_save=async_save, resume=True)
    assert whole["seen"] == 6
    assert {name: tensor.tolist() for name, tensor in again.items()} == {n: t.tolist() for n, t in whole.items()}
    held = [name for name in Index(tmp_path / "cut" / "checkpoints" / "step-00000004").tensors if "buffers/" in name]
    assert sorted(held) == ["buffers/even", "buffers/mean", "buffers/seen"]


def test_what_is_copied_is_what_was_there() -> None:
    model = Centred()
    (mean,) = (s for s in Buffers({0: model}, True).slices(copied=True) if s.name == "buffers/mean")
    before = mean.tensor.clone()
    model.mean.zero_()
    assert torch.equal(mean.tensor, before)


def test_another_shape_is_an_error(tmp_path: Path) -> None:
    run(tmp_path, 2)
    model = Centred()
    model.register_buffer("mean", torch.zeros(WIDTH, 1))
    with (
        ParallelState.build(Layout.of(), World.single()) as state,
        pytest.raises(CheckpointError, match="buffers/mean"),
    ):
        trainer(state, model, tmp_path, resume=True)


def of_ranks(world: World, layout: Layout, out: Path) -> tuple[list[float], dict[str, list[float]]]:
    """This rank's values once a trainer is made, and those of a checkpoint that is loaded into another one."""
    torch.manual_seed(world.rank)
    made: list[nn.Module] = []

    def model(spec: stretto.StageSpec) -> nn.Module:
        made.append(Centred())
        return Named(f"layer{spec.index}", made[-1])

    more: dict[str, Any] = {} if layout.size("pp") == 1 else {"boundary": (2, WIDTH), "micro_batch": 2}
    with ParallelState.build(layout, world) as state:
        with trainer(state, model, out, **more) as first:
            begun = made[-1].mean.tolist()
            first.save()
        torch.manual_seed(7 + world.rank)
        with trainer(state, model, out, resume=True, **more):
            return begun, {name: tensor.tolist() for name, tensor in made[-1].named_buffers() if name == "mean"}


class Named(nn.Module):
    """A module under a name of its own."""

    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.inner_name = name
        self.add_module(name, inner)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = getattr(self, self.inner_name)(x)
        return y


def test_replicas_begin_alike_and_every_stage_is_saved(pool: Pool, tmp_path: Path) -> None:
    (first, loaded), (second, also) = pool.run(2, of_ranks, Layout.of(dp=2), tmp_path / "dp")
    assert first == second == loaded["mean"] == also["mean"]
    (first, loaded), (second, also) = pool.run(2, of_ranks, Layout.of(pp=2), tmp_path / "pp")
    assert first != second
    assert (loaded["mean"], also["mean"]) == (first, second)


def test_what_no_checkpoint_could_hold_is_said(caplog: pytest.LogCaptureFixture) -> None:
    layout = Layout.of(tp=2)
    with (
        ParallelState.inspect(layout, 0) as state,
        patch.object(Buffers, "align"),
        caplog.at_level(logging.WARNING),
    ):
        assert Buffers.of({0: Centred()}, state).slices() == []
    assert "buffers are not in checkpoints where layers are cut (tp=2): mean, seen, even" in caplog.text
    with (
        ParallelState.inspect(Layout.of(), 0) as state,
        patch("stretto.train.buffers.all_gather_json", lambda names, _: [list(names), list(names)]),
        pytest.raises(ValueError, match="several stages have a buffer mean, seen, even: name layers"),
    ):
        Buffers.of({0: Centred()}, state)
