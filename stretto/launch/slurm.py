"""A SLURM batch script for a job: one task per GPU, a warning before the end, and a requeue that goes on."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from stretto.initialize.stop import REQUEUE
from stretto.launch.job import WARNING_SECONDS, Job

TIME = r"(\d+-)?\d{1,2}(:\d{2}){0,2}"


@dataclass(frozen=True)
class SlurmJob(Job):
    """Write a batch script for SLURM."""

    time: str = "24:00:00"
    """Limit, as SLURM writes it: [days-]hours:minutes:seconds."""
    partition: str | None = None
    account: str | None = None
    cpus_per_gpu: int | None = None
    setup: str | None = None
    """A shell command to run on the first node before the ranks start, such as `source venv/bin/activate`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(TIME, self.time):
            raise ValueError(f"time={self.time!r} is not of the form [days-]hours:minutes:seconds")
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"name={self.name!r}: letters, digits, '_', '-' and '.'")

    def script(self) -> str:
        """The text of the script."""
        return SCRIPT.format(
            options="\n".join(f"#SBATCH --{name}={value}" for name, value in self._options()),
            setup=f"{self.setup}\n\n" if self.setup else "",
            train=" ".join(shlex.quote(word) for word in self.train),
            requeue=REQUEUE,
        )

    def _options(self) -> list[tuple[str, object]]:
        options = [
            ("job-name", self.name),
            ("nodes", self.nodes),
            ("ntasks-per-node", self.gpus_per_node),
            ("gpus-per-node", self.gpus_per_node),
            ("cpus-per-task", self.cpus_per_gpu),
            ("time", self.time),
            ("partition", self.partition),
            ("account", self.account),
            ("signal", f"USR1@{WARNING_SECONDS}"),
            ("output", "%x-%j.log"),
            ("open-mode", "append"),
        ]
        return [(name, value) for name, value in options if value is not None]


SCRIPT = """\
#!/bin/bash
{options}
#SBATCH --requeue
#SBATCH --exclusive
set -euo pipefail

{setup}# srun starts each rank and tells it its place. The ranks meet on the first node, at a port of this job.
export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_PORT="$((10000 + SLURM_JOB_ID % 20000))"

# A job that was started again goes on from its newest complete checkpoint, if it came so far.
resume=()
if [ "${{SLURM_RESTART_COUNT:-0}}" -gt 0 ]; then
    resume=(--auto-resume)
fi

code=0
srun --kill-on-bad-exit=1 ${{SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}} \\
    python -m stretto train {train} "${{resume[@]}}" || code="$?"

# The ranks were warned that the time was nearly up, saved, and asked to be started again.
if [ "$code" -eq {requeue} ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
