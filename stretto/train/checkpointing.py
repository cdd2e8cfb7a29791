"""`TrainState`: exactly what a checkpoint holds, and how it goes there and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from stretto.arguments import Arguments
from stretto.checkpoint import CheckpointError, load
from stretto.checkpoint.index import Index
from stretto.estimate import count_parameters
from stretto.parallel_state import ParallelState
from stretto.params import Slice
from stretto.reading import shown
from stretto.train.batches import Batches
from stretto.train.buffers import Buffers
from stretto.train.step import Optimizer


@dataclass
class TrainState:
    """Weights and moments (in the optimizer), the place in the data, the updates made, and buffers of a user's modules.

    Nothing else moves during a run: the learning rate and every random number are functions of these and the seed.
    """

    optimizer: Optimizer
    batches: Batches
    step: int = 0
    buffers: Buffers = field(default_factory=Buffers)

    def slices(self) -> list[Slice]:
        """The tensors of a checkpoint, where they lie."""
        return [*self.optimizer.slices(), *self.buffers.slices()]

    def load(self, path: str | Path, state: ParallelState) -> None:
        """Go on from a checkpoint that any layout wrote.

        Raises CheckpointError when it does not fit, DataError when it is of other data.
        """
        world = state.axis("tp", "cp", "dp", "pp")
        extra = load(path, self.slices(), state.world, group=world.group)
        self.batches.load_state_dict(_place_of(extra, path))
        self.step = step_of(extra, path)
        self.optimizer.loaded(self.step)


def require_fits(args: Arguments, path: Path) -> None:
    """Raise CheckpointError where `args` describe a model far larger than a checkpoint holds: before it is made.

    A record may be damaged, or somebody's who wants memory to run out. What is nearly as large is loaded, which tells
    all tensors that differ.
    """
    held = sum(prod(t.shape) for name, t in Index(path).tensors.items() if name.startswith("model/"))
    wanted = count_parameters(args.model, args.batch.seq_len).total
    if wanted > 4 * held + _SMALL:
        raise CheckpointError(
            f"{path} holds a model of {held:,} parameters, the settings describe one of {wanted:,}: "
            "they are not those of this checkpoint"
        )


def step_of(extra: Mapping[str, Any], path: str | Path) -> int:
    """The updates made when a checkpoint was written. Raises CheckpointError when it does not say."""
    step = extra.get("step")
    if type(step) is not int or not 0 <= step < 2**60:
        raise CheckpointError(f"{path} was not written by `stretto train`: its step is {shown(step)}")
    return step


def _place_of(extra: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """The place in the data, as `Batches.state_dict` gave it: what it may hold is for `Batches` to say."""
    feed = extra.get("feed")
    if not isinstance(feed, dict):
        raise CheckpointError(f"{path} was not written by a trainer: its place in the data is {shown(feed)}")
    return feed


_DIGEST = 200
"""Letters that a digest of a corpus does not have."""

_SMALL = 2**24
"""Parameters that any machine holds."""
