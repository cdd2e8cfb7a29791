"""Real torchrun: on one host, and on two hosts made of network namespaces."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.gloo

PROGRAM = Path(__file__).parent / "distributed_program.py"
TORCHRUN = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


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
    began = time.monotonic()
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", str(PROGRAM), "raise"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENV, check=False)
    assert done.returncode != 0
    assert "Connection closed by peer" not in done.stderr  # what the other rank raised first
    _, _, root_cause = done.stderr.partition("Root Cause (first observed failure):")
    assert "rank      : 1" in root_cause
    assert root_cause.rstrip(" =\n").endswith("ValueError: the fault of rank 1")
    assert time.monotonic() - began < 40


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces, 10.211.0.1 and 10.211.0.2, joined by a wire."""
    names = f"st{os.getpid()}a", f"st{os.getpid()}b"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        ip("netns", "add", names[0])
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not make network namespaces")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.211.0.{number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def on(host: str, *command: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["ip", "netns", "exec", host, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV | {"GLOO_SOCKET_IFNAME": "eth0"} | env,
    )


def test_two_hosts_of_two_ranks(hosts: tuple[str, str]) -> None:
    common = [*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "2", "--master-addr", "10.211.0.1"]
    nodes = [on(host, *common, "--node-rank", str(n), str(PROGRAM)) for n, host in enumerate(hosts)]
    outputs = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    lines = sorted(line for out, _ in outputs for line in out.splitlines())
    assert lines == [f"torchrun: rank {r} of 4, local {r % 2}: 4" for r in range(4)]


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
