"""A SLURM batch script for a job: one task per rank, a warning before the end, and a requeue that goes on.

srun ends all ranks as soon as one has an exit code other than 0, which is right when a rank fails. A run that was
warned must therefore end with 0 on all ranks, whoever leaves first; that it is to be started again is said by a file
that rank 0 leaves after the save (`stretto.initialize.stop.MARK`). An exit code could not say it: a rank that is still
on its way out would be killed, and then its own end is the code of srun.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from stretto.arguments.setting import setting
from stretto.initialize.stop import MARK
from stretto.launch.job import WARNING_SECONDS, Job
from stretto.launch.slurm_time import limit_seconds


@dataclass(frozen=True)
class SlurmJob(Job):
    """Write a batch script for SLURM."""

    time: str = setting(
        "24:00:00",
        "limit, as sbatch takes it: minutes, [hours:]minutes:seconds, days-hours[:minutes[:seconds]], 0 or UNLIMITED",
    )
    partition: str | None = setting(None, "that of SLURM")
    account: str | None = setting(None, "that of SLURM")
    cpus_per_task: int | None = setting(
        None, "CPUs of each rank; unset: its share of those that the job has on the node that has fewest", at_least=1
    )
    exclusive: bool = setting(True, "the job has its nodes for itself")
    sbatch: tuple[str, ...] = setting(
        (),
        "another option of sbatch, such as qos=high, mem=0, constraint=h100 or container=PATH; may be repeated, and "
        "takes the place of the script's own of that name",
        repeats=True,
        named="NAME[=VALUE]",
    )
    srun: tuple[str, ...] = setting(
        (), "an option of srun, such as container-image=IMAGE; may be repeated", repeats=True, named="NAME[=VALUE]"
    )
    setup: str | None = setting(
        None, "a shell command to run on the first node before the ranks start, such as `source venv/bin/activate`"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        limit_seconds(self.time)
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"name={self.name!r}: letters, digits, '_', '-' and '.'")
        if self.cpus_per_task is not None and self.cpus_per_task < 1:
            raise ValueError(f"cpus_per_task={self.cpus_per_task}: at least 1")
        for option in (*self.sbatch, *self.srun):
            if not re.fullmatch(r"(--)?[a-z][a-z0-9-]*(=[^\n]*)?", option):
                raise ValueError(f"{option!r} is no option: write NAME=VALUE or NAME, as in qos=high")
        said = {_name(option) for option in self.sbatch}
        own = {"nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "job-name"}
        for name in sorted(said & own):
            instead = {"ntasks-per-node": "gpus-per-node", "job-name": "name"}.get(name, name)
            raise ValueError(f"sbatch={name}: the script follows from it, so say --{instead}")

    def script(self) -> str:
        """The text of the script."""
        return SCRIPT.format(
            options="\n".join(f"#SBATCH --{option}" for option in self._options()),
            setup=f"{self.setup}\n\n" if self.setup else "",
            train=" ".join(shlex.quote(word) for word in self.train),
            srun="".join(f" {shlex.quote(_flag(option))}" for option in self.srun),
            ranks=self.gpus_per_node,
            mark=MARK,
        )

    def _options(self) -> list[str]:
        limit = limit_seconds(self.time)
        options = {
            "job-name": self.name,
            "nodes": self.nodes,
            "ntasks-per-node": self.gpus_per_node,
            "gpus-per-node": self.gpus_per_node if self.device == "cuda" else None,
            "cpus-per-task": self.cpus_per_task,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            # A warning must not come before a short job has begun.
            "signal": None if limit is None else f"USR1@{min(WARNING_SECONDS, limit // 2)}",
            "output": "%x-%j.log",
            "open-mode": "append",
        }
        said = {_name(option): _quoted(option) for option in self.sbatch}
        lines = {name: f"{name}={value}" for name, value in options.items() if value is not None}
        lines |= {"requeue": "requeue"} | ({"exclusive": "exclusive"} if self.exclusive else {})
        return list((lines | said).values())


def _flag(option: str) -> str:
    return f"--{option.removeprefix('--')}"


def _quoted(option: str) -> str:
    """As it stands after the dashes in a line of the script; sbatch reads quotes as a shell does."""
    name, equals, value = _flag(option)[2:].partition("=")
    return f"{name}{equals}{shlex.quote(value) if value else ''}"


def _name(option: str) -> str:
    return _flag(option)[2:].partition("=")[0]


SCRIPT = """\
#!/bin/bash
{options}
set -euo pipefail

# Rank 0 writes to the log of this job; the other ranks have a log each in a directory beside it.
logs="$PWD/$SLURM_JOB_NAME-$SLURM_JOB_ID"
mkdir -p "$logs"

{setup}# srun starts each rank and tells it its place. The ranks meet on the first node, at a port of this job.
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR MASTER_PORT="$((10000 + SLURM_JOB_ID % 20000))"

# Each rank has the CPUs that were asked for, or its share of those of the node that has fewest.
fewest="$(tr , '\\n' <<< "$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | sed -n 1p)"
cpus="${{SLURM_CPUS_PER_TASK:-$((fewest < {ranks} ? 1 : fewest / {ranks}))}}"
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-$cpus}}"

# A run that was warned that the time is nearly up saves, leaves this file, and ends with 0.
export {mark}="$logs/requeue"
rm -f "${mark}"

# A warning must not end a Python that has no handler yet, or none any more. (coreutils before 8.31 cannot do that.)
hold=()
if env --block-signal=USR1 true 2> /dev/null; then hold=(env --block-signal=USR1); fi

# With --auto-resume, this script goes on from the newest complete checkpoint whenever it is started again, by SLURM
# or by hand, and begins the run where there is none.
code=0
srun --kill-on-bad-exit=1 --wait=0 --cpus-per-task="$cpus"{srun} \\
    bash -c '[ "$SLURM_PROCID" = 0 ] || exec >> "$0/rank-$(printf %05d "$SLURM_PROCID").log" 2>&1; exec "$@"' "$logs" \\
    "${{hold[@]}}" python -m stretto train --auto-resume {train} || code="$?"

# A rank whose warning could not be held back is ended by it.
if [ -e "${mark}" ] || [ "$code" -eq "$((128 + $(kill -l USR1)))" ]; then
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    echo "job $SLURM_JOB_ID could not be requeued; submit this script again to go on" >&2
    exit 75
fi
exit "$code"
"""
