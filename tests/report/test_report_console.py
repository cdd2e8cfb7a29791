"""Live progress where somebody sits at the terminal, and plain lines wherever else there is one."""

from __future__ import annotations

import fcntl
import os
import pty
import subprocess
import sys
import termios

import pytest

pytestmark = pytest.mark.gloo

PROGRAM = """
import os, sys
from stretto.report.console import console_for
where, progress, launcher = sys.argv[1:]
if where == "worker" or where == "background":
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        os._exit(0)
    os.setpgid(0, 0)
if where == "background" and (child := os.fork()):  # whose parent is not in front, either
    os.waitpid(child, 0)
    os._exit(0)
console, manner = console_for(progress, launcher)
os.write(int(os.environ["SAID"]), f"{manner} {console.is_terminal}".encode())
"""


def told(where: str, progress: str = "auto", launcher: str = "python") -> str:
    """How a command that was started in this way shows progress, and whether its console is a terminal."""
    keyboard, terminal = pty.openpty()
    said, write = os.pipe()
    out: int = subprocess.DEVNULL if where == "file" else terminal

    def settle() -> None:
        os.setsid()
        if where != "no session":
            fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    command = [sys.executable, "-c", PROGRAM, where, progress, launcher]
    env = {**os.environ, "TERM": "dumb" if where == "dumb" else "xterm", "SAID": str(write)}
    done = subprocess.run(command, stdin=terminal, stdout=out, preexec_fn=settle, pass_fds=[write], env=env, check=True)
    assert done.returncode == 0
    os.close(write)
    text = os.read(said, 100).decode()
    for fd in (keyboard, terminal, said):
        os.close(fd)
    return text


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("terminal", "live True"),
        ("worker", "live True"),
        ("background", "lines False"),
        ("file", "lines False"),
        ("no session", "lines False"),
        ("dumb", "lines False"),
    ],
)
def test_progress_is_live_only_where_the_command_is_in_front(where: str, expected: str) -> None:
    """Catches: a live bar in the log of a command that was given a terminal and nobody sits at it."""
    assert told(where) == expected


@pytest.mark.parametrize(
    ("where", "progress", "launcher", "expected"),
    [
        ("terminal", "auto", "mpirun (Open MPI)", "lines False"),
        ("terminal", "lines", "python", "lines True"),
        ("terminal", "none", "python", "none True"),
        ("file", "live", "python", "live True"),
    ],
)
def test_what_the_user_says_comes_first_and_mpi_is_never_live(
    where: str, progress: str, launcher: str, expected: str
) -> None:
    assert told(where, progress, launcher) == expected
