"""A process that stays single-threaded, with torch imported, and forks workers on request.

Forking costs milliseconds where importing torch costs seconds, but a process that has run torch operations
has threads, and a fork of it may inherit a lock that nobody will release. So this server is forked early and
does nothing but fork; workers that had to be ended are replaced from it as clean as the first ones were.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import TextIO

Serve = Callable[[int, Connection], None]


class ForkServer:
    """The caller's handle: `start` forks workers, `kill` ends them, `close` ends the server as well."""

    def __init__(self, serve: Serve) -> None:
        """Fork the server now. Its workers run `serve(rank, connection)` and exit."""
        self._control, server = socket.socketpair()
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            # Python warns of any second thread. Those of OpenBLAS, which NumPy starts, are made for forks.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        if self._pid == 0:
            self._control.close()
            _exit_after(lambda: _serve_requests(server, serve))
        server.close()

    def start(self, size: int) -> list[Connection]:
        """Fork `size` workers; connection i leads to worker i, and ends when that worker does."""
        pairs = [Pipe() for _ in range(size)]
        theirs = [b.fileno() for _, b in pairs]
        socket.send_fds(self._control, [b"S%3d" % size], theirs)
        self._reply()
        for _, b in pairs:
            b.close()
        return [a for a, _ in pairs]

    def signal(self, ranks: list[int], number: int) -> None:
        """Send a signal to these workers of the last start."""
        self._ask(b"T" + json.dumps([number, *ranks]).encode())

    def kill(self) -> list[int]:
        """End all workers of the last start; their exit codes, negative for the signal that ended one."""
        return self._ask(b"K")

    def close(self) -> None:
        """End the workers and the server."""
        with contextlib.suppress(OSError):
            self._control.sendall(b"Q")  # closing alone is not seen while another child holds a copy
        self._control.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)

    def _ask(self, request: bytes) -> list[int]:
        self._control.sendall(request)
        return self._reply()

    def _reply(self) -> list[int]:
        answer = self._control.recv(65536)
        if not answer:
            raise RuntimeError("the fork server of the worker pool has ended; make a new pool")
        result: list[int] = json.loads(answer)
        return result


def _serve_requests(control: socket.socket, serve: Serve) -> None:
    os.setsid()  # Ctrl-C on the terminal is for the owner, who ends us by closing the socket
    sys.stdout, sys.stderr = _line_buffered(1), _line_buffered(2)
    pids: list[int] = []
    while True:
        request, fds, _, _ = socket.recv_fds(control, 65536, 253)
        if request in (b"", b"Q"):
            break
        answer: list[int] = []
        if request[:1] == b"S":
            pids = [_fork_worker(rank, fds, control, serve) for rank in range(len(fds))]
            for fd in fds:
                os.close(fd)
        elif request[:1] == b"T":
            number, *ranks = json.loads(request[1:])
            for rank in ranks:
                os.kill(pids[rank], number)
        else:
            answer, pids = _end(pids), []
        control.sendall(json.dumps(answer).encode())
    _end(pids)


def _line_buffered(fd: int) -> TextIO:
    return open(fd, "w", buffering=1, closefd=False)


def _fork_worker(rank: int, fds: list[int], control: socket.socket, serve: Serve) -> int:
    if pid := os.fork():
        return pid
    control.close()
    for other, fd in enumerate(fds):
        if other != rank:
            os.close(fd)
    _exit_after(lambda: serve(rank, Connection(fds[rank])))
    raise AssertionError("unreachable")


def _end(pids: list[int]) -> list[int]:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number cannot belong to another process
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def _exit_after(body: Callable[[], None]) -> None:
    """Run `body` in a forked child, and never return into the frames that the fork copied."""
    code = 1
    try:
        body()
        code = 0
    except KeyboardInterrupt:
        pass
    except BaseException:  # noqa: BLE001  # shown, and then the process ends
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
