"""Real torchrun: on one host, and on two hosts made of network namespaces."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.gloo

PROGRAM = Path(__file__).parent / "distributed_program.py"
TORCHRUN = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.mark.nightly
def test_torchrun_on_one_host() -> None:
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "3", str(PROGRAM)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENV, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"torchrun: rank {r} of 3, local {r}: 3" for r in range(3)]


def test_a_restarted_job_does_not_read_the_keys_of_its_first_attempt() -> None:
    command = [*TORCHRUN, "--standalone", "--max-restarts", "1", "--nproc-per-node", "2", str(PROGRAM), "restart"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENV, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rank 0 of 2") == 2


def test_torchrun_names_the_rank_that_raised_and_ends_all() -> None:
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", str(PROGRAM), "raise"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENV, check=False)
    ended = time.monotonic()
    assert done.returncode != 0
    assert "Connection closed by peer" not in done.stderr  # what the other rank raised first
    _, _, root_cause = done.stderr.partition("Root Cause (first observed failure):")
    assert "rank      : 1" in root_cause
    assert root_cause.rstrip(" =\n").endswith("ValueError: the fault of rank 1")
    raised = re.search(r"raised at (\S+)", done.stdout)
    assert raised is not None
    assert ended - float(raised[1]) < 40


def on(host: str, *command: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["ip", "netns", "exec", host, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV | {"GLOO_SOCKET_IFNAME": "eth0"} | env,
    )


@pytest.mark.nightly
def test_two_hosts_of_four_ranks_and_one_that_is_killed(hosts: tuple[str, str]) -> None:
    """All meet; then rank 5 is killed: within 15 s both torchruns have ended, and that of its host names it."""
    common = [*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "4", "--master-addr", "10.211.0.1"]
    nodes = [on(host, *common, "--node-rank", str(n), str(PROGRAM), "kill") for n, host in enumerate(hosts)]
    lines = [node.stdout.readline().strip() for node in nodes for _ in range(4) if node.stdout is not None]
    assert sorted(lines) == [f"torchrun: rank {r} of 8, local {r % 4}: 8" for r in range(8)]
    began = time.monotonic()
    outputs = [node.communicate(timeout=60) for node in nodes]
    assert time.monotonic() - began < 15
    assert [node.returncode for node in nodes] == [1, 1], outputs
    cause = outputs[1][1].partition("Root Cause (first observed failure):")[2]
    assert "rank      : 5" in cause
    assert "Signal 9 (SIGKILL) received" in cause


def test_srun_on_two_hosts_without_a_master_address(hosts: tuple[str, str]) -> None:
    """What srun sets; the first host of its list, found by its address, serves the store."""
    step = {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NODELIST": "10.211.0.[1-2]",
        "SLURM_LOCALID": "0",
    }
    tasks = [
        on(host, sys.executable, str(PROGRAM), SLURM_PROCID=str(n), SLURM_NODEID=str(n), **step)
        for n, host in enumerate(hosts)
    ]
    outputs = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert [out for out, _ in outputs] == [f"srun: rank {r} of 2, local 0: 2\n" for r in range(2)]
