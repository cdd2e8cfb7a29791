"""How the states of a run are saved: while training goes on, or with training waiting for the disk."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stretto.checkpoint import Saved, Saver, prune, save
from stretto.checkpoint.directory import Retention
from stretto.checkpoint.peers import Peers
from stretto.checkpoint.places import place
from stretto.checkpoint.probe import require_shared
from stretto.parallel_state import ParallelState
from stretto.params import Slice
from stretto.train.checkpointing import TrainState

DRAIN_SECONDS = 60.0
"""How long a run that has diverged waits for a save from before."""


@dataclass(frozen=True)
class SavePolicy:
    """Where checkpoints go, which stay, and whether training waits for the disk. `about` is stored as JSON beside."""

    directory: str | Path
    retention: Retention
    about: Mapping[str, Any]
    asynchronous: bool = False


class Saves:
    """The saves of a run. All ranks call `reserve`, `begin` and `finish` together; the rest may be called by any."""

    def __init__(self, train_state: TrainState, state: ParallelState, policy: SavePolicy) -> None:
        self.train_state, self.state, self.policy = train_state, state, policy
        self._group = state.axis("tp", "cp", "dp", "pp").group
        self._saver: Saver | None = None
        self._told: list[Saved] = []
        self._copied: list[Slice] = []

    def reserve(self) -> None:
        """Get ready, so that the first save takes no longer than others, and does not fail for where it goes.

        Raises CheckpointError on all ranks where nothing can be written there, or not all see what is.
        """
        require_shared(self.policy.directory, Peers.of(self.state.world, self._group))
        if self.policy.asynchronous:
            self._asynchronous().reserve(self.train_state.slices())

    def begin(self) -> None:
        """Save the state as it is now. CheckpointError on all ranks when this or the save before cannot be done."""
        if not self.policy.asynchronous:
            self.save_now()
            return
        here = self.train_state
        buffers = here.buffers.slices(copied=True)  # the next forward changes them while a GPU's are copied
        slices = [*here.optimizer.slices(), *buffers]
        self._asynchronous().begin(self.policy.directory, here.step, slices, self._extra())
        self._copied = buffers  # those of the save before are in the host's memory now

    def save_now(self) -> Path:
        """Save the state as it is now, and return when it is whole."""
        self._told += self.finish()
        began = time.monotonic()
        step, retention = self.train_state.step, self.policy.retention
        slices, world = self.train_state.slices(), self.state.world
        path = save(self.policy.directory, step, slices, self._extra(), world, group=self._group)
        if world.rank == 0:
            prune(place(self.policy.directory), retention.keep, retention.keep_every)
        seconds = time.monotonic() - began
        nbytes = sum(s.tensor.nbytes for s in slices if s.owner)
        self._told.append(Saved(step, path, seconds, seconds, 0.0, 0.0, seconds, nbytes))
        return path

    def before_update(self) -> None:
        """Weights are about to change."""
        if self._saver is not None:
            self._saver.before_update()

    @property
    def failed(self) -> bool:
        """Whether this rank knows that a save has failed: the run should stop, on all ranks, and then raises."""
        return self._saver is not None and self._saver.failed

    def poll(self) -> list[Saved]:
        """The checkpoints that have become whole since the last time; of asynchronous ones, on rank 0 alone."""
        told, self._told = self._told, []
        return told + (self._saver.poll() if self._saver is not None else [])

    def finish(self) -> list[Saved]:
        """Wait for what is under way; as `poll`."""
        return self._saver.finish() if self._saver is not None else []

    def drain(self) -> None:
        """The run fails, on all ranks alike: wait for what is under way, without the others."""
        if self._saver is not None:
            self._saver.drain(DRAIN_SECONDS)

    def close(self) -> None:
        """Let go of memory and writer; what the writer has, it still writes."""
        if self._saver is not None:
            self._saver.close()

    def _asynchronous(self) -> Saver:
        if self._saver is None:
            self._saver = Saver(self.state.world, group=self._group, retention=self.policy.retention)
        return self._saver

    def _extra(self) -> dict[str, Any]:
        here = self.train_state
        return {**self.policy.about, "step": here.step, "feed": here.batches.state_dict()}
