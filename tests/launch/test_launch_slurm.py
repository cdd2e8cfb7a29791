"""The scripts of `stretto launch slurm` under a real SLURM of two nodes, which `.ci/launchers` starts.

Each job is a run of two ranks on two nodes. All are submitted at once, and those that are resubmitted wait in the queue
for the end of the first try.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import slurm_program

from stretto.cli.launch import main
from stretto.launch.slurm_time import limit_seconds

pytestmark = [
    pytest.mark.launchers,
    pytest.mark.skipif("SLURM_CONF" not in os.environ or not shutil.which("sbatch"), reason="there is no SLURM here"),
]

STEPS, SAVE_EVERY = 24, 5
STOPPED = slurm_program.STEP + 1
"""The step after which a run has stopped: ranks hear one step later what was voted in a step."""
RESUBMITTED = ("terminated", "cancelled", "killed")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


def slurm(*command: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # of tests, not of jobs
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout


def asked(job: str) -> dict[str, str]:
    """What SLURM says of a job."""
    return dict(re.findall(r"(\S+?)=(\S*)", slurm("scontrol", "show", "job", "-o", job)))


@dataclass(frozen=True)
class Submitted:
    """A job, and another try of the same script, in a directory of its own."""

    directory: Path
    job: str
    again: str | None

    def end(self, job: str | None = None) -> dict[str, str]:
        """What SLURM says of it when it has ended."""
        deadline = time.monotonic() + 280
        while (said := asked(job or self.job))["JobState"] not in ENDED:
            assert time.monotonic() < deadline, f"{said}\n{self.log()}"
            time.sleep(0.3)
        return said

    def log(self, job: str | None = None) -> str:
        """What rank 0 and SLURM have written."""
        return (self.directory / f"stretto-{job or self.job}.log").read_text()

    def rank(self, number: int) -> str:
        """What another rank has written."""
        return (self.directory / f"stretto-{self.job}" / f"rank-{number:05d}.log").read_text()

    def rows(self) -> list[dict[str, Any]]:
        """The metrics of the run, all but what a clock has measured, and when checkpoints became whole."""
        (run,) = (self.directory / "runs").iterdir()
        lines = [each for each in (run / "metrics.jsonl").read_text().splitlines() if "checkpoint_bytes" not in each]
        figures = ("step", "loss", "grad_norm", "lr", "tokens", "epoch", "held_out_loss", "held_out_bits_per_byte")
        return [{k: v for k, v in json.loads(line).items() if k in figures} for line in lines]

    def require_whole(self, other: Submitted) -> None:
        """It has ended, with the figures of the undisturbed run."""
        assert [row["step"] for row in self.rows() if "loss" in row] == list(range(1, STEPS + 1))
        assert other.end()["JobState"] == "COMPLETED", other.log()
        assert self.rows() == other.rows()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Submitted]:
    """All jobs, submitted."""
    root = tmp_path_factory.mktemp("slurm")
    (root / "text").mkdir()
    for i in range(20):
        (root / "text" / f"{i}.txt").write_text(f"over the hills and far away {i}\n" * 20)
    quick = ("undisturbed", "warned", "warned_at_the_start", "raised", "raised_at_the_start", *RESUBMITTED)
    jobs = {what: submit(root, what, 0.3, "--time", "0:10:00") for what in quick}
    # SLURM warns up to a minute early: here, after half a minute at the soonest.
    return jobs | {"out_of_time": submit(root, "undisturbed", 5, "--time", "2", "--cpus-per-task", "3")}


def submit(root: Path, what: str, seconds: float, *options: str) -> Submitted:
    directory = root / f"{what}-{seconds}"
    directory.mkdir()
    python = directory / "bin" / "python"  # the script asks for `python`, as in an activated environment
    python.parent.mkdir()
    python.write_text(f'#!/bin/bash\nexec "{sys.executable}" "{slurm_program.__file__}" {what} {seconds} "$@"\n')
    python.chmod(0o755)
    script = directory / "job.sbatch"
    setup = f'export PATH="{python.parent}:$PATH" PYTHONPATH="{Path(__file__).parents[2]}"'
    words = ["slurm", "--nodes", "2", "--gpus-per-node", "1", "--no-exclusive", "--setup", setup, *options]
    train = (
        f"--preset tiny --steps {STEPS} --save-every {SAVE_EVERY} --no-tensorboard --timeout 60 --held-out 0.2".split()
    )
    train += ["--data", str(root / "text"), "--cache", str(directory / "cache")]
    assert main([*words, "--out", str(script), "--", *train]) == 0
    job = slurm("sbatch", "--parsable", f"--chdir={directory}", str(script)).strip()
    again = None
    if what in RESUBMITTED:
        waits = (f"--dependency=afterany:{job}", "--export=ALL,SECOND=1")
        again = slurm("sbatch", "--parsable", f"--chdir={directory}", *waits, str(script)).strip()
    return Submitted(directory, job, again)


def test_a_warned_job_is_requeued_and_goes_on_though_a_rank_is_slow_to_leave(jobs: dict[str, Submitted]) -> None:
    """Catches: exit code 75 on all ranks, which has srun kill the slow one, and the job FAILED with 143."""
    job = jobs["warned"]
    end = job.end()
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("COMPLETED", "1", "0:0"), job.log()
    assert re.search(rf"stopped at step {STOPPED} of {STEPS}; go on with the same command; \S+/requeue asks", job.log())
    assert f"step {STOPPED}, runs/stretto-" in job.log()
    job.require_whole(jobs["undisturbed"])


def test_a_job_that_is_warned_before_the_ranks_have_met_is_requeued(jobs: dict[str, Submitted]) -> None:
    job = jobs["warned_at_the_start"]
    end = job.end()
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), job.log()
    job.require_whole(jobs["undisturbed"])


@pytest.mark.parametrize(
    ("what", "state", "from_step"),
    [("terminated", "COMPLETED", STOPPED), ("cancelled", "CANCELLED", STOPPED), ("killed", "FAILED", 10)],
)
def test_a_resubmitted_script_goes_on(jobs: dict[str, Submitted], what: str, state: str, from_step: int) -> None:
    """SIGTERM saves and is no reason to requeue; a rank that is killed ends the job. Catches: a script begun anew."""
    job = jobs[what]
    end = job.end()
    assert (end["JobState"], end["Restarts"]) == (state, "0"), job.log()
    assert job.again
    assert job.end(job.again)["JobState"] == "COMPLETED", job.log(job.again)
    assert f"step {from_step}, runs/stretto-" in job.log(job.again)
    job.require_whole(jobs["undisturbed"])


def test_an_exception_ends_the_job_which_tells_it(jobs: dict[str, Submitted]) -> None:
    job = jobs["raised"]
    end = job.end()
    assert (end["JobState"], end["Restarts"]) == ("FAILED", "0"), job.log()
    for log in (job.log(), job.rank(1)):
        assert "ValueError: the fault of rank 1" in log


def test_an_exception_at_the_start_is_no_reason_to_requeue(jobs: dict[str, Submitted]) -> None:
    """Catches: ranks that srun ends with SIGTERM before the first step, whose 75 hides the failure and has it again."""
    job = jobs["raised_at_the_start"]
    end = job.end()
    assert (end["JobState"], end["Restarts"]) == ("FAILED", "0"), job.log()
    assert "ValueError: the fault of rank 1" in job.rank(1)


def test_every_rank_has_a_log_and_its_cpus(jobs: dict[str, Submitted]) -> None:
    assert jobs["undisturbed"].end()["JobState"] == "COMPLETED", jobs["undisturbed"].log()
    for name, cpus in (("undisturbed", 1), ("out_of_time", 3)):
        log = jobs[name].log()
        assert f"rank 0: {cpus} cpus, {cpus} threads\n" in log
        assert ("rank 1:" in log, "\x1b" in log) == (False, False)
        assert jobs[name].rank(1).splitlines()[0] == f"rank 1: {cpus} cpus, {cpus} threads"
    assert f"step {STEPS}/{STEPS}  loss" in jobs["undisturbed"].log()


def test_the_limit_of_its_time_requeues_a_job(jobs: dict[str, Submitted]) -> None:
    job = jobs["out_of_time"]
    while asked(job.job)["Restarts"] == "0":
        assert asked(job.job)["JobState"] not in ENDED, job.log()
        time.sleep(0.3)
    slurm("scancel", job.job)
    assert job.end()["JobState"] == "CANCELLED"
    assert re.search(r"(stopped at step \d+|SIGUSR1 before the first step).* \S+/requeue asks", job.log()), job.log()


TIMES = ["1", "90", "0:30", "1:00", "100:01", "2:00:00", "26:00:59", "1-0", "2-30", "1-2:3", "1-2:3:4", "0"]


@pytest.mark.parametrize("time", [*TIMES, "UNLIMITED", "infinite"])
def test_sbatch_takes_every_form_of_time_as_we_read_it(tmp_path: Path, time: str) -> None:
    script = tmp_path / "job.sbatch"
    free = ["--sbatch", "comment=two words", "--sbatch", "mem=100", "--sbatch", "hold"]
    assert main(["slurm", "--time", time, *free, "--out", str(script), "--", "--device", "cuda"]) == 0
    job = slurm("sbatch", "--parsable", f"--chdir={tmp_path}", str(script)).strip()
    said = asked(job)
    slurm("scancel", job)
    assert (said["TresPerNode"], said["MinMemoryNode"]) == ("gres:gpu:8", "100M")
    if (seconds := limit_seconds(time)) is None:
        assert said["TimeLimit"] == "UNLIMITED"
    else:
        minutes, seconds = divmod(seconds, 60)
        days, hours = divmod(minutes // 60, 24)
        assert said["TimeLimit"] == f"{days}-" * (days > 0) + f"{hours:02d}:{minutes % 60:02d}:{seconds:02d}"


@pytest.mark.parametrize("time", ["tomorrow", "1:2:3:4", "1-2-3"])
def test_what_sbatch_does_not_take_is_rejected(time: str) -> None:
    with pytest.raises(ValueError, match="none of sbatch's forms"):
        limit_seconds(time)
    rejected = subprocess.run(
        ["sbatch", "--test-only", f"--time={time}", "--wrap=true"], capture_output=True, check=False
    )
    assert rejected.returncode != 0
