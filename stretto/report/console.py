"""Where rank 0 speaks, and in which manner: on a terminal that somebody sits at, or in lines of a file."""

from __future__ import annotations

import os
import sys
from typing import Literal

from rich.console import Console

from stretto.console import console

Manner = Literal["live", "lines", "none"]
"""How progress is shown: in two lines that are kept up to date, in a line for each report, or not at all."""


def console_for(progress: Literal["auto", "live", "lines", "none"], launcher: str) -> tuple[Console, Manner]:
    """The console of a run that `launcher` (`World.source`) has started, and how it shows progress.

    A terminal that nobody sits at, such as the one that Open MPI gives to rank 0, is written to like a file.
    """
    someone = attended() and not launcher.startswith("mpi")
    manner: Manner = progress if progress != "auto" else "live" if someone else "lines"
    if manner == "live":
        return console(force_terminal=True, goes_on=True), manner
    plain = False if sys.stdout.isatty() and not someone else None
    return console(force_terminal=plain, goes_on=True), manner


def attended() -> bool:
    """Whether standard output is the controlling terminal, with this command in its foreground.

    Local workers are in process groups of their own, so what started this process may be the one in front.
    """
    try:
        front = os.tcgetpgrp(sys.stdout.fileno())
        return os.environ.get("TERM") != "dumb" and front in (os.getpgrp(), os.getpgid(os.getppid()))
    except (OSError, ValueError):  # no terminal at all, or one of another session
        return False
