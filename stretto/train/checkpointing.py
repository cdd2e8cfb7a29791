"""`TrainState`: exactly what a checkpoint holds, and how it goes there and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stretto.checkpoint import load, prune, save
from stretto.parallel_state import ParallelState
from stretto.train.batches import Batches
from stretto.train.step import Optimizer


@dataclass
class TrainState:
    """Weights and moments (in the optimizer), the place in the data, and the updates made.

    Nothing else moves during a run: the learning rate and every random number are functions of these and the seed.
    """

    optimizer: Optimizer
    batches: Batches
    step: int = 0

    def save(self, directory: Path, about: Mapping[str, Any], state: ParallelState, *, keep: int) -> Path:
        """Write a checkpoint, then remove all but the newest `keep`. `about` is stored beside it as JSON."""
        extra = {**about, "step": self.step, "feed": self.batches.state_dict()}
        world = state.axis("tp", "cp", "dp", "pp")
        path = save(directory, self.step, self.optimizer.slices(), extra, state.world, group=world.group)
        if state.world.rank == 0:
            prune(directory, keep)
        return path

    def load(self, path: Path, state: ParallelState) -> None:
        """Go on from a checkpoint that any layout wrote.

        Raises CheckpointError when it does not fit, DataError when it is of other data.
        """
        world = state.axis("tp", "cp", "dp", "pp")
        extra = load(path, self.optimizer.slices(), state.world, group=world.group)
        self.batches.load_state_dict(extra["feed"])
        self.step = int(extra["step"])
        self.optimizer.loaded(self.step)
