"""One forked worker: how it starts, and how it ended."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import IO

from stretto.collective_trace.alive import state
from stretto.initialize.failures import Failure
from stretto.initialize.stop import HEARD, Stopped, heard
from stretto.terminal import say

PASSED_ON = HEARD
"""Signals that the parent passes on to its workers."""


@dataclass
class Worker:
    """One rank: how it runs, how it ended."""

    rank: int
    pid: int
    report: IO[bytes]
    """Where the worker leaves its `Failure`, so that it can be shown last."""
    ended: int = -1
    """Place in the order of endings; -1 while it runs."""
    code: int | None = None
    """Exit code, negative for the signal that ended it; None while it runs."""
    sent: int = 0
    """The last signal that it got from us."""
    failure: Failure | None = None
    halted: bool = False
    """Whether it was found stopped (SIGSTOP) when it should have ended with the others, and was therefore killed."""

    def send(self, number: int) -> None:
        """Send a signal, if it still runs: the process is not reaped yet, so its number is still its own."""
        if self.code is None:
            self.sent = number
            os.kill(self.pid, number)

    def take_end(self, order: int) -> bool:
        """Whether it has ended; then code and failure are known."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            return False
        self.code, self.ended = os.waitstatus_to_exitcode(status), order
        self.report.seek(0)
        if written := self.report.read():
            self.failure = Failure.decode(written)
        self.report.close()
        return True

    @property
    def at_a_halt(self) -> bool:
        """Whether it is stopped, as by SIGSTOP: it neither runs nor ends."""
        return state(f"{socket.gethostname()}/{self.pid}") == "stopped"

    @property
    def stopped(self) -> bool:
        """Whether it ended as the signal that we passed on to it asked."""
        return self.sent > 0 and self.code in (-self.sent, 128 + self.sent)

    @property
    def killed(self) -> bool:
        """Whether a signal ended it that did not come from us, nor from itself in giving up."""
        signalled = -(self.code or 0)
        return signalled > 0 and signalled not in (self.sent, signal.SIGABRT)

    def severity(self) -> tuple[int, int]:
        """The smallest is the cause: what a rank did by itself, before what follows from another's end."""
        code = self.code or 0
        if self.killed or self.halted or (self.failure is not None and self.failure.own):
            level = -2  # nobody's table of calls explains it better
        elif self.failure is not None and self.failure.finding:
            level = -1
        elif code < 0:
            level = 4 if -code == self.sent else 1
        elif self.failure is None:
            level = 2
        else:
            level = 3 if self.failure.consequence else 0
        return level, self.ended

    def ending(self) -> str:
        """How it ended, in words."""
        code = self.code or 0
        if self.halted:
            return "was stopped (SIGSTOP) and did not go on; its launcher ended it"
        if self.failure is not None:
            kind = "it did not answer" if self.failure.silent else self.failure.summary.partition(":")[0]
            lost = self.failure.consequence or self.failure.finding
            return f"then lost a peer ({kind})" if lost else self.failure.summary
        if code >= 0:
            return f"ended with exit code {code}"
        name = signal.Signals(-code).name
        if -code == self.sent:
            return f"was ended by {name} from its launcher"
        return f"was ended by {name}" + (" (the system's way when memory runs out)" if name == "SIGKILL" else "")


def fork(
    rank: int,
    environment: dict[str, str],
    listener: socket.socket,
    target: Callable[[], int],
    within: AbstractContextManager[object],
) -> Worker:
    """Fork a worker that runs `target` as this rank and exits with what it returns; never returns in it.

    It enters `within` before the first signal can reach it: those of `PASSED_ON` are to be blocked here.
    """
    report = tempfile.TemporaryFile()  # noqa: SIM115  # closed when the worker has ended
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        # Python warns of any second thread. Those of OpenBLAS, which NumPy starts, are made for forks.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return Worker(rank, pid, report)
    code = 1
    try:
        _settle(parent)
        listener.close()
        os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
        within.__enter__()  # and never out: the process ends in it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        code = _code(target())
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Stopped as stopped:
        code = stopped.say(rank)
        os.kill(parent, stopped.number)  # who may have told this rank alone: the others would wait for it
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1 if end.code else 0
        if isinstance(end.code, str):
            say(end.code)
    except BaseException as error:  # noqa: BLE001  # it travels to the parent, who shows it
        report.write(Failure.of(rank, error).encode())
        report.flush()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # never return into the frames that the fork copied


def _code(returned: object) -> int:
    if not isinstance(returned, int):
        raise TypeError(f"what runs in a worker returned {returned!r}: it must return its exit code, 0 for success")
    return int(returned)


def _settle(parent: int) -> None:
    """Make a forked child a process of its own: signals, standard input, and an end when its parent ends."""
    os.setpgid(0, 0)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # <linux/prctl.h>
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it ended before we asked to be told
    with open(os.devnull) as null:  # noqa: PTH123
        os.dup2(null.fileno(), 0)  # a process in the background that reads the terminal is stopped
    for number in heard():
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.enable()
