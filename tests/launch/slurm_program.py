"""`python -m stretto ...` as a rank of a SLURM job runs it, with steps that take a while.

    python slurm_program.py WHAT SECONDS -m stretto train ...

On the first start of the job, WHAT happens. At each start rank 1 takes two seconds to leave: srun must not lose it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from stretto.cli import main, resume
from stretto.initialize import process
from stretto.train.loop import Loop

STEP = 12
"""As this step begins, something happens."""
RANK = int(os.environ.get("SLURM_PROCID", "0"))
JOB = os.environ.get("SLURM_JOB_ID", "")


def warned() -> None:
    """As at the end of the job's time."""
    if RANK == 0:
        cancel("--signal=USR1")


def terminated() -> None:
    if RANK == 0:
        cancel("--signal=TERM")


def cancelled() -> None:
    if RANK == 0:
        cancel()


def cancel(*options: str) -> None:
    """scancel, which is a process of this job, too, and so gets the signal that it sends."""
    ignore = "trap '' USR1 TERM; exec scancel"
    subprocess.run(["bash", "-c", f"{ignore} {' '.join(options)} {JOB}"], check=True)
    time.sleep(1)


def killed() -> None:
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def raised() -> None:
    if RANK == 1:
        raise ValueError("the fault of rank 1")


def undisturbed() -> None:
    pass


def warned_at_the_start() -> None:
    """Before the ranks have met; all of them have come so far."""
    both_are_here()
    if RANK == 1:
        cancel("--signal=USR1")
    time.sleep(60)


def raised_at_the_start() -> None:
    both_are_here()
    if RANK == 1:
        raise ValueError("the fault of rank 1")


def both_are_here() -> None:
    Path(f"here-{RANK}").touch()
    while not (Path("here-0").exists() and Path("here-1").exists()):
        time.sleep(0.05)


def run(what: str, seconds: float, argv: list[str]) -> int:
    """`stretto ARGV` with that between its steps, or at its start."""
    first = not int(os.environ.get("SLURM_RESTART_COUNT", "0")) and "SECOND" not in os.environ
    happen = globals()[what]
    meet, step = process.rendezvous, Loop._step

    def meet_after_it(*args: Any, **more: Any) -> Any:
        if first and what.endswith("_at_the_start"):
            happen()
        return meet(*args, **more)

    def step_after_it(self: Loop) -> Any:
        time.sleep(seconds)
        if first and self.train_state.step + 1 == STEP and not what.endswith("_at_the_start"):
            happen()
        return step(self)

    process.rendezvous = resume.rendezvous = meet_after_it  # the second one where there may be a checkpoint
    Loop._step = step_after_it  # type: ignore[method-assign]
    print(f"rank {RANK}: {os.environ['SLURM_CPUS_PER_TASK']} cpus, {os.environ['OMP_NUM_THREADS']} threads", flush=True)
    code = main(argv)
    if RANK == 1:
        time.sleep(2)
    return code


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], float(sys.argv[2]), sys.argv[sys.argv.index("stretto") + 1 :]))
