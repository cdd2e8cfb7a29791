"""When this process began; pure, and without torch."""

from __future__ import annotations

import os
import time
from pathlib import Path


def process_began() -> float:
    """The moment at which this process was made, on the clock of `time.monotonic`; now, where the system hides it.

    So much of a start is over before its first line runs: the interpreter, and the imports of that line's file.
    """
    try:
        # <proc_pid_stat(5)>: field 22 is the time since boot in ticks; the name, field 2, may have spaces in it.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot
    except (OSError, AttributeError, ValueError, IndexError):
        age = 0.0
    return time.monotonic() - max(0.0, age)  # both clocks at once: reading the file may take a busy machine a while
