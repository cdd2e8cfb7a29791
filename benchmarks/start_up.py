"""Seconds from a command to its help, to its refusal of a wrong setting, and to eight ranks' first all-reduce.

    python benchmarks/start_up.py [--nproc 8] [--repeat 3]

`forked` starts local workers from one process that has torch loaded; `torchrun` starts as many interpreters.
The best of the repetitions counts: what is above it is other work of the machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
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


def seconds(command: list[str], repeat: int) -> float:
    """The shortest run of a command."""

    def once() -> float:
        began = time.perf_counter()
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, capture_output=True, check=False, timeout=300, env=env)
        return time.perf_counter() - began

    return min(once() for _ in range(repeat))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nproc", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    nproc = str(options.nproc)
    with tempfile.TemporaryDirectory() as directory:
        forked, started = Path(directory) / "forked.py", Path(directory) / "started.py"
        forked.write_text(FORKED)
        started.write_text(STARTED)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", nproc]
        for name, command in {
            "stretto --help": [sys.executable, "-m", "stretto", "--help"],
            "stretto train --tp 3 (refused)": [sys.executable, "-m", "stretto", "train", "--tp", "3"],
            "import torch": [sys.executable, "-c", "import torch"],
            f"{nproc} ranks, forked": [sys.executable, str(forked), nproc],
            f"{nproc} ranks, torchrun": [*torchrun, str(started)],
        }.items():
            print(f"{name:<32} {seconds(command, options.repeat):6.2f} s", flush=True)


if __name__ == "__main__":
    main()
