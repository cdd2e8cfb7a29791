"""The writer process of a rank: it writes what the trainer has staged in shared memory, while training goes on.

It imports no torch, so it is there within a tenth of a second, and owns no thread of the trainer. They talk over a
socket, in lines of JSON: a job in one direction (with the first one comes the shared memory), what became of it in the
other. All ranks' parts meet in the directory itself: the writer of rank 0 opens the save under a token, the others wait
to see it, and rank 0's waits for the parts of all. So no rank's training thread takes part.

When the trainer is killed the socket ends. What was staged is whole by then, so the writer finishes it, and gives up
after `GRACE` seconds when parts of other ranks do not come.
"""

from __future__ import annotations

import array
import json
import mmap
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from stretto.checkpoint.commit import commit, missing_parts
from stretto.checkpoint.directory import prepare, prune
from stretto.checkpoint.errors import CheckpointError, describe
from stretto.checkpoint.marker import WRITING
from stretto.checkpoint.part import Mine, write_part
from stretto.checkpoint.places import place, write_atomically

GRACE: Final = 30.0
"""Seconds that a writer whose trainer has ended waits for what other ranks owe."""

NICE: Final = 10
"""Lower priority than training has, where they share cores."""

POLL: Final = (0.005, 0.25)
"""Seconds between looks at the directory, at first and at most."""

FOR_THE_TRAINER: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals that a writer ignores: a trainer answers them by finishing its save."""


@dataclass(frozen=True)
class Job:
    """One save, on one rank."""

    path: str
    step: int
    rank: int
    size: int
    token: str
    places: tuple[int, ...]
    """Where each piece lies in the shared memory."""
    mine: Mine
    extra: str = ""
    keep: int = 0
    """Prune to so many afterwards; 0: do not."""
    keep_every: int = 0

    def encode(self) -> bytes:
        """One line of JSON."""
        return json.dumps(vars(self) | {"mine": self.mine.as_dict()}, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def decode(cls, line: bytes) -> Job:
        """What `encode` gave."""
        said = json.loads(line)
        return cls(**said | {"mine": Mine.from_dict(said["mine"]), "places": tuple(said["places"])})


class Line:
    """A socket that carries lines of JSON, and perhaps a descriptor with the first."""

    def __init__(self, end: socket.socket) -> None:
        self.socket, self.fds, self._rest, self.ended = end, array.array("i"), b"", False

    def say(self, **what: Any) -> None:
        """Send an object; to nobody, where the other side has ended."""
        try:
            self.socket.sendall(json.dumps(what).encode() + b"\n")
        except OSError:
            self.ended = True

    def take(self, seconds: float | None) -> bytes | None:
        """The next line; None when none came in this time (None: ever), or the other side has ended."""
        until = None if seconds is None else time.monotonic() + seconds
        while b"\n" not in self._rest:
            left = None if until is None else max(0.0, until - time.monotonic())
            if self.ended or not select.select([self.socket], [], [], left)[0]:
                return None
            try:
                data, fds, _, _ = socket.recv_fds(self.socket, 2**20, 1)
            except OSError:
                data, fds = b"", []
            self.fds.extend(fds)
            self.ended = not data
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line


class Writer:
    """Does one job after the other, as long as its trainer lives."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self._memory: memoryview | None = None

    def run(self) -> None:
        """Until the trainer has ended."""
        while (said := self.line.take(None)) is not None:
            if self.line.fds:
                (fd,) = self.line.fds
                self._memory = memoryview(mmap.mmap(fd, os.fstat(fd).st_size, access=mmap.ACCESS_READ))
                os.close(self.line.fds.pop())
            try:
                self.do(Job.decode(said))
            except Exception as error:  # noqa: BLE001  whatever it is, the trainer must hear of it
                self.line.say(failed=describe(error))

    def do(self, job: Job) -> None:
        """Write this rank's part; on rank 0, make the checkpoint whole."""
        path, began = place(job.path), time.monotonic()
        if job.rank == 0:
            prepare(path)
            write_atomically(path / WRITING, job.token.encode())
        else:
            self.wait(lambda: _token(path) == job.token, lambda: f"rank 0 has not begun to write {path}")
        memory = self._memory or memoryview(b"")
        pieces = [memory[at : at + p.nbytes] for at, p in zip(job.places, job.mine.pieces, strict=True)]
        written = write_part(path, job.rank, job.token, job.mine, lambda i: pieces[i])
        self.line.say(part=job.step, bytes=written, seconds=time.monotonic() - began)
        if job.rank != 0:
            return

        def missing() -> str:
            return f"ranks {missing_parts(path, job.size, job.token)} have not written their parts of {path}"

        self.wait(lambda: not missing_parts(path, job.size, job.token), missing)
        commit(path, job.step, job.size, job.token, job.extra.encode())
        removed = prune(path.parent, job.keep, job.keep_every) if job.keep else ()
        self.line.say(committed=job.step, seconds=time.monotonic() - began, removed=[str(each) for each in removed])

    def wait(self, come: Callable[[], bool], why: Callable[[], str]) -> None:
        """Until what other ranks owe is there. Raises CheckpointError when it does not come after our trainer ended."""
        pause, most = POLL
        until = None
        while not come():
            self.line.take(pause)  # nothing is sent during a job: it returns at once where the trainer has ended
            if self.line.ended:
                until = until or time.monotonic() + GRACE
                if time.monotonic() > until:
                    raise CheckpointError(why())
                time.sleep(pause)
            pause = min(2 * pause, most)


def _token(path: Path) -> str:
    try:
        return (path / WRITING).read_text()
    except OSError:
        return ""


def main(argv: Sequence[str] = ()) -> None:
    """On descriptor 0 is the socket. `argv` are names of modules whose function `install()` is called before."""
    for number in FOR_THE_TRAINER:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FOR_THE_TRAINER)  # ignored by now, also those that came meanwhile
    os.nice(NICE)
    for name in argv:
        __import__(name, fromlist=["install"]).install()
    Writer(Line(socket.socket(fileno=os.dup(0)))).run()


if __name__ == "__main__":
    main(sys.argv[1:])
