"""Whether another process of this machine still runs: what a store cannot tell of a rank that does not come."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def me() -> str:
    """This process, as others of the machine may find it."""
    return f"{socket.gethostname()}/{os.getpid()}"


def state(process: str) -> str:
    """ "dead" or "stopped"; empty for a process that runs, is on another machine, or where the system does not say."""
    host, _, pid = process.rpartition("/")
    if host != socket.gethostname() or not Path("/proc/self/stat").exists():
        return ""
    try:
        # proc(5): "PID (NAME) STATE ..", and the name may have parentheses of its own.
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "dead"
    return {"Z": "dead", "X": "dead", "T": "stopped", "t": "stopped"}.get(letter, "")
