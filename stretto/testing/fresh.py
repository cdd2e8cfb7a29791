"""`Fresh`: run a function as a program of its own, without the seconds that importing torch would cost.

    ended = fresh.run(main, ["train", "--run.steps", "2"])     # Ended(code=0, out="...", err="", seconds=1.9)

For what cannot be tested inside a process: exit codes, output, signals, the start of further processes.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from stretto.testing.forkserver import ForkServer

POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Ended:
    """How a program ended; `code` is negative for the signal that ended it."""

    code: int
    out: str
    err: str
    seconds: float


class Fresh:
    """Forks programs, one at a time. Make it early, as a `Pool`: before torch has computed anything."""

    def __init__(self) -> None:
        self._server = ForkServer(_serve)

    def close(self) -> None:
        """End the program that runs, if one does, and the server."""
        self._server.close()

    def start(
        self,
        fn: Callable[..., int | None],
        *args: Any,
        env: Mapping[str, str] | None = None,
        terminal: int | None = None,
    ) -> Program:
        """Start `fn(*args)` in a new process and session, whose exit code is what it returns.

        `env` replaces the environment; `terminal`, the descriptor of a terminal, becomes the session's.
        """
        self._server.kill()
        directory = tempfile.TemporaryDirectory(prefix="stretto-fresh-")
        tty = os.ttyname(terminal) if terminal is not None else None
        connection = self._server.start(1)[0]
        connection.send_bytes(pickle.dumps((fn, args, dict(os.environ if env is None else env), directory.name, tty)))
        return Program(self._server, connection, directory)

    def run(
        self,
        fn: Callable[..., int | None],
        *args: Any,
        env: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> Ended:
        """Run `fn(*args)` to its end, and to that of all processes that it started."""
        return self.start(fn, *args, env=env).wait(timeout)


class Program:
    """A function that runs as a program."""

    def __init__(self, server: ForkServer, connection: Connection, directory: tempfile.TemporaryDirectory[str]) -> None:
        self._server, self._connection, self._directory = server, connection, directory
        self._began = time.monotonic()
        self._session: int = connection.recv()

    @property
    def out(self) -> str:
        """What it has written to standard output so far."""
        return (Path(self._directory.name) / "out").read_text()

    @property
    def err(self) -> str:
        """What it has written to standard error so far."""
        return (Path(self._directory.name) / "err").read_text()

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self._server.signal([0], number)

    def until(self, text: str, times: int = 1, *, timeout: float = 60.0) -> None:
        """Wait until its standard output has `text` so many times; raises `TimeoutError`."""
        deadline = time.monotonic() + timeout
        while not (Path(self._directory.name) / "out").exists() or self.out.count(text) < times:
            if time.monotonic() > deadline or self._connection.poll(POLL_SECONDS):
                raise TimeoutError(f"no {times} times {text!r} in {self.out!r}; errors: {self.err!r}")

    def wait(self, timeout: float = 60.0) -> Ended:
        """Wait for its end, and that of all processes it started; past `timeout` end it and raise."""
        done = self._connection.poll(timeout)  # the end of the connection, which all of them hold
        seconds = time.monotonic() - self._began
        if not done:
            _end_session(self._session)
        ended = Ended(self._server.kill()[0], self.out, self.err, seconds)
        self._connection.close()
        self._directory.cleanup()
        if not done:
            raise TimeoutError(f"not done after {timeout:g} s: {ended}")
        return ended


def _end_session(session: int) -> None:
    """Kill all processes of a session: a program that hangs should leave none behind."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getsid(int(entry.name)) == session:
                os.kill(int(entry.name), signal.SIGKILL)


def _serve(_rank: int, connection: Connection) -> None:
    """In the new process: take the place of a program, run, and exit."""
    fn, args, env, directory, tty = pickle.loads(connection.recv_bytes())
    os.setsid()
    connection.send(os.getpid())
    if tty is not None:
        os.dup2(os.open(tty, os.O_RDWR), 0)  # the first terminal that a session opens becomes its own
    for stream, fd in (("out", 1), ("err", 2)):
        os.dup2(os.open(Path(directory) / stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    os.environ.clear()
    os.environ.update(env)
    code = 1
    try:
        code = fn(*args) or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001  # as the interpreter does
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
