"""Asynchronous saves: the trainer stages its state and goes on; a writer process of each rank does the rest.

    saver.begin(directory, step, slices, extra)     # on every rank, after the update of `step`
    ...                                             # steps; before each update: saver.before_update()
    for saved in saver.poll(): ...                  # at any time, on any rank: what has become whole, on rank 0
    saver.finish()                                  # on every rank

At most one save is under way: `begin` waits for the one before, and says how long. Ranks agree only there and in
`finish`. A save that failed raises there, on all ranks alike; before that it is `failed` on the rank that noticed.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from stretto.checkpoint.directory import Retention, abandon, step_path
from stretto.checkpoint.errors import CheckpointError
from stretto.checkpoint.marker import MARKER
from stretto.checkpoint.part import Mine, Owned
from stretto.checkpoint.peers import Peers
from stretto.checkpoint.places import is_local, place
from stretto.checkpoint.planner import described
from stretto.checkpoint.staging import Staging
from stretto.checkpoint.writer import Job
from stretto.checkpoint.writer_process import WriterProcess
from stretto.params import Slice
from stretto.world import World


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is whole, and what it took, on rank 0. Training waited for `stall` of it."""

    step: int
    path: Path
    seconds: float
    """From the call to the marker."""
    stall: float
    """What training waited, in `begin`."""
    waited: float
    """Of that, for the save before to end."""
    copied: float
    """Until the copy was there; from a GPU it overlaps the next step."""
    written: float
    """This rank's part, by its writer."""
    nbytes: int
    """Of this rank's part."""


@dataclass
class _InFlight:
    job: Job
    path: Path
    saved: Saved
    began: float
    sent: bool = False
    part: bool = False
    whole: bool = False

    @property
    def doing(self) -> str:
        return f"saving step {self.job.step} to {self.path}"


class Saver:
    """Saves of one run on one rank; all ranks make one and use it together."""

    def __init__(self, world: World, *, group: ProcessGroup | None = None, retention: Retention | None = None) -> None:
        """`group` spans exactly the ranks of `world`; with a `retention`, older checkpoints are pruned after each."""
        self.peers, self.device, self.retention = Peers.of(world, group), world.device, retention
        mine = secrets.token_hex(6) if self.peers.rank == 0 else ""
        self._token, self._count = self.peers.gather(mine)[0], 0
        self._staging: Staging | None = None
        self._writer: WriterProcess | None = None
        self._now: _InFlight | None = None
        self._told: list[Saved] = []
        self._failure: str | None = None

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the save under way has failed: `begin` or `finish` is due, on all ranks."""
        return self._failure is not None

    def reserve(self, slices: Sequence[Slice]) -> None:
        """Take the memory and start the writer, so that the first save does not; on every rank."""
        with self.peers.on_all_ranks("preparing to save"):
            self._ready(described(slices)[0].pieces)

    def begin(self, directory: str | Path, step: int, slices: Sequence[Slice], extra: Mapping[str, Any]) -> None:
        """Begin to save, and return when the state is staged or on its way there.

        Raises CheckpointError on all ranks when the save before has failed on any, or this one cannot begin.
        """
        began = time.monotonic()
        self._settle()
        waited = time.monotonic() - began
        path = step_path(place(directory), step)
        self.peers.require_same("directories to save in", str(path))
        self._count += 1
        with self.peers.on_all_ranks(f"saving step {step} to {path}"):
            document = json.dumps(dict(extra), indent=1) if self.peers.rank == 0 else ""
            mine, tensors = described(slices)
            staging = self._ready(mine.pieces)
        staging.copy(tensors)
        now = time.monotonic()
        saved = Saved(step, path, 0.0, now - began, waited, now - began - waited, 0.0, staging.nbytes)
        self._now = _InFlight(self._job(path, step, mine, staging, document), path, saved, began)
        self._look(self._now)

    def before_update(self) -> None:
        """Weights are about to change: what is being copied from a GPU comes first."""
        if self._staging is not None:
            self._staging.before_update()

    def poll(self) -> list[Saved]:
        """Hand over what is staged by now; the checkpoints that have become whole since the last time, on rank 0."""
        if self._now is not None and self._failure is None:
            self._look(self._now)
        told, self._told = self._told, []
        return told

    def finish(self) -> list[Saved]:
        """Wait for the save under way. Raises CheckpointError on all ranks when it has failed on any."""
        self._settle()
        return self.poll()

    def drain(self, seconds: float) -> None:
        """Wait for it on this rank alone, without the others: all fail alike, and what is staged should not be lost."""
        until = time.monotonic() + seconds
        with suppress(CheckpointError):
            while (now := self._now) is not None and self._failure is None:
                if time.monotonic() > until or self._over(now, 0.05):
                    return

    def close(self) -> None:
        """Let the writer end by itself; what it has, it writes."""
        if self._writer is not None:
            self._writer.close()
        if self._staging is not None:
            self._staging.close()
        self._writer = self._staging = None

    def _ready(self, pieces: tuple[Owned, ...]) -> Staging:
        if self._staging is None or self._staging.pieces != pieces or self._writer is None:
            self.close()
            self._staging = Staging(pieces, self.device)
            self._writer = WriterProcess(self._staging.fd)
        return self._staging

    def _job(self, path: Path, step: int, mine: Mine, staging: Staging, extra: str) -> Job:
        stays = self.retention
        keep, every = (stays.keep, stays.keep_every) if stays else (0, 0)
        token, peers = f"{self._token}{self._count:x}", self.peers
        return Job(
            f"{path.absolute() if is_local(path) else path}",
            step,
            peers.rank,
            peers.size,
            token,
            staging.places,
            mine,
            extra,
            keep,
            every,
        )

    def _settle(self) -> None:
        """The save under way is over: whole, or all ranks raise."""
        now = self._now
        if now is None:
            return
        try:
            self.peers.wait_for_all(now.doing, lambda seconds: self._over(now, seconds))
        except CheckpointError:
            if self._writer is not None:
                self._writer.kill()
                self._writer = None
            self.peers.gather("")  # no writer of any rank is left
            if self.peers.rank == 0 and not (now.path / MARKER).exists():
                abandon(now.path)
            raise
        finally:
            self._now, self._failure = None, None

    def _look(self, now: _InFlight) -> None:
        try:
            self._advance(now, 0.0)
        except CheckpointError as error:
            self._failure = str(error)

    def _over(self, now: _InFlight, seconds: float) -> bool:
        """Whether this rank has done its part, which is all on rank 0; waits for it so long at most."""
        if self._failure is not None:
            raise CheckpointError(self._failure)
        self._advance(now, seconds)
        return now.whole if self.peers.rank == 0 else now.part

    def _advance(self, now: _InFlight, seconds: float) -> None:
        """Send the job once its state is staged, and hear what became of it; waits so long at most for the latter."""
        assert self._staging is not None
        assert self._writer is not None
        if not now.sent:
            if seconds:
                self._staging.wait()
            if not self._staging.done:
                return
            if self.device.type == "cuda":
                now.saved = replace(now.saved, copied=time.monotonic() - now.began - now.saved.waited)
            self._writer.send(now.job)
            now.sent = True
        while not (now.whole if self.peers.rank == 0 else now.part):
            if (said := self._writer.hear(seconds)) is None:
                return
            if "part" in said:
                now.part, now.saved = True, replace(now.saved, written=said["seconds"], nbytes=said["bytes"])
            elif "committed" in said:
                now.whole = True
                self._told.append(replace(now.saved, seconds=time.monotonic() - now.began))
