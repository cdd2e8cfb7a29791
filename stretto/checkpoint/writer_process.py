"""The trainer's side of its writer process."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, Final

from stretto.checkpoint.errors import CheckpointError
from stretto.checkpoint.writer import FOR_THE_TRAINER, Job, Line

HOOKS: Final = "STRETTO_WRITER_HOOKS"
"""Variable with modules that a writer imports first, separated by commas: how drills make a disk slow or full."""

_PROGRAM: Final = """
import sys
sys.path[:0] = [sys.argv.pop(1)]
from stretto.checkpoint.writer import main
main(sys.argv[1:])
"""


class _Socket(socket.socket):
    """Closed with who has it, without a warning: a trainer that nobody closes is no fault."""

    def __del__(self) -> None:
        self.close()


class WriterProcess:
    """Starts a writer, hands it jobs, and hears what became of them. Nothing here waits unless it says so."""

    def __init__(self, memory: int | None) -> None:
        """Start the writer; `memory` is a descriptor of shared memory, which it gets with the first job."""
        ours, theirs = socket.socketpair()
        self.line, self._memory = Line(_Socket(fileno=ours.detach())), memory
        source = str(Path(__file__).parents[2])
        hooks = [name for name in os.environ.get(HOOKS, "").split(",") if name]
        null = os.open(os.devnull, os.O_RDWR)
        # Another program, not a fork: the trainer has threads. In a session of its own, a terminal's signals do not
        # reach it. SLURM's do (they go to every process of a step), so they are held back until it ignores them.
        self.pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-c", _PROGRAM, source, *hooks],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, theirs.fileno(), 0),
                (os.POSIX_SPAWN_DUP2, null, 1),
                (os.POSIX_SPAWN_DUP2, null, 2),
            ],
            setsid=True,
            setsigmask=FOR_THE_TRAINER,
        )
        os.close(null)
        theirs.close()
        self._reaped: int | None = None

    def send(self, job: Job) -> None:
        """Hand over a job."""
        data = job.encode()
        try:
            if self._memory is not None:
                sent = socket.send_fds(self.line.socket, [data], [self._memory])
                self._memory, data = None, data[sent:]
            self.line.socket.sendall(data)
        except OSError:
            self.line.ended = True

    def hear(self, seconds: float | None = 0.0) -> dict[str, Any] | None:
        """What the writer says next; None when it says nothing in that time.

        Raises CheckpointError when it says that the save has failed, or is no more.
        """
        line = self.line.take(seconds)
        if line is None and self.line.ended:
            raise CheckpointError(f"the writer process (pid {self.pid}) {self._ending()}")
        said: dict[str, Any] | None = json.loads(line) if line else None
        if said and "failed" in said:
            raise CheckpointError(said["failed"])
        return said

    def close(self) -> None:
        """Let it end, by itself, after what it is doing."""
        self.line.socket.close()
        self._reap(0.0)

    def kill(self) -> None:
        """End it now."""
        if self._reap(0.0) is None:
            os.kill(self.pid, signal.SIGKILL)
        self._reap(10.0)
        self.line.socket.close()

    def _ending(self) -> str:
        status = self._reap(2.0)
        if status is None:
            return "has closed its connection"
        code = os.waitstatus_to_exitcode(status)
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def _reap(self, seconds: float) -> int | None:
        until = time.monotonic() + seconds
        while self._reaped is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                return None
            if pid:
                self._reaped = status
            elif time.monotonic() > until:
                return None
            else:
                time.sleep(0.005)
        return self._reaped
