"""Seconds from a command to its help, to its rejection of a wrong setting, and to the end of eight ranks' first step.

    python -m benchmarks.start_up [--nproc 8] [--repeat 3]

`first step` is `stretto train --preset demo`, from the making of its process to the line that it prints when the first
step is done; its own account of the quickest of these runs is printed, too. `forked` starts local workers from one
process that has torch loaded, for one all-reduce; `torchrun` starts as many interpreters.
The best of the repetitions counts: what is above it is other work of the machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

RANK = """
import torch, torch.distributed as dist
from stretto.initialize import initialize

def rank() -> int:
    with initialize(timeout=60):
        dist.all_reduce(torch.ones(1))
    return 0
"""
FORKED = (
    RANK + "\nimport sys\nfrom stretto.launch.local import run_local\nsys.exit(run_local(int(sys.argv[1]), rank))\n"
)
STARTED = RANK + "\nrank()\n"
STRETTO = [sys.executable, "-m", "stretto"]
LINE = "start-up "


def whole(command: list[str], code: int = 0) -> tuple[float, str]:
    """How long a command took that ends with `code`; nothing to add."""
    began = time.perf_counter()
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, check=False, timeout=300, env=env, text=True)
    if ended.returncode != code:
        raise SystemExit(f"{' '.join(command)} ended with {ended.returncode}, not {code}:\n{ended.stderr}")
    return time.perf_counter() - began, ""


def first_step(nproc: str, *, cold: bool) -> tuple[float, str]:
    """How long `stretto train` took to the end of its first step, and its own account of it.

    `cold`: it has to make tokens of the text first; else it has done so before.
    """
    with tempfile.TemporaryDirectory() as directory:
        words = ["train", "--preset", "demo", "--nproc", nproc, "--steps", "1", "--sample-tokens", "0"]
        words += ["--out", f"{directory}/run", *(["--cache", f"{directory}/cache"] if cold else [])]
        began = time.perf_counter()
        with subprocess.Popen([*STRETTO, *words], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            line = next((line.strip() for line in process.stdout if line.startswith(LINE)), "")
            seconds = time.perf_counter() - began
            process.stdout.read()
        if process.returncode or not line:
            raise SystemExit(f"stretto {' '.join(words)} ended with {process.returncode}")
        return seconds, line


def main() -> None:
    """Measure, and print each figure as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    nproc = str(options.nproc)
    with tempfile.TemporaryDirectory() as directory:
        forked, started = Path(directory) / "forked.py", Path(directory) / "started.py"
        forked.write_text(FORKED)
        started.write_text(STARTED)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", nproc]
        measured: dict[str, tuple[float | None, Callable[[], tuple[float, str]]]] = {
            "stretto --help": (0.5, lambda: whole([*STRETTO, "--help"])),
            "stretto train --help": (0.5, lambda: whole([*STRETTO, "train", "--help"])),
            "stretto train --tp 3 (rejected)": (0.5, lambda: whole([*STRETTO, "train", "--tp", "3"], code=2)),
            "import torch": (None, lambda: whole([sys.executable, "-c", "import torch"])),
            f"{nproc} ranks, forked": (None, lambda: whole([sys.executable, str(forked), nproc])),
            f"{nproc} ranks, torchrun": (None, lambda: whole([*torchrun, str(started)])),
            f"{nproc} ranks, first step": (10.0, lambda: first_step(nproc, cold=False)),
            "the same, no tokens yet": (None, lambda: first_step(nproc, cold=True)),
        }
        for name, (goal, measure) in measured.items():
            if goal == 10.0:
                measure()  # so that there are tokens
            seconds, account = min(measure() for _ in range(options.repeat))
            print(f"{name:<32} {seconds:6.2f} s" + (f"   goal {goal:g} s" if goal else ""), flush=True)
            if account:
                print(f"    {account}", flush=True)


if __name__ == "__main__":
    main()
