"""Tasks of srun on two hosts that are network namespaces, forked from one process that has torch loaded."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from stretto.initialize import initialize

CLONE_NEWNET, CLONE_NEWUTS = 0x40000000, 0x04000000  # <sched.h>
PER_HOST = 4


def step(rank: int) -> dict[str, str]:
    """What srun sets for a task of 8 on two hosts."""
    return {
        "SLURM_JOB_ID": "78",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_STEP_NODELIST": "10.211.0.[1-2]",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % PER_HOST),
        "SLURM_NODEID": str(rank // PER_HOST),
        "MASTER_PORT": "23456",
    }


def enter(host: str) -> None:
    """Move this process into a network namespace, which is the name of its host from then on."""
    libc = ctypes.CDLL(None, use_errno=True)
    with (Path("/var/run/netns") / host).open() as file:
        if libc.setns(file.fileno(), CLONE_NEWNET) or libc.unshare(CLONE_NEWUTS):
            raise OSError(ctypes.get_errno(), f"the namespaces of {host}")
    socket.sethostname(host)


def task(host: str, env: dict[str, str], what: str) -> None:
    """One rank: its sum, or what it failed with, and after how many seconds, as a line of JSON."""
    enter(host)
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    began = time.monotonic()
    said = ""
    try:
        with initialize(env=env, start_timeout=3, timeout=5 if what == "link cut" else 60, threads=1) as world:
            x = torch.ones(1)
            dist.all_reduce(x)
            said = f"sum {x.item():.0f}"
            if what == "killed rank" and world.rank == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "killed rank":
                dist.barrier()
            while what == "link cut":
                dist.all_reduce(x)
                time.sleep(0.1)
    except Exception as error:  # noqa: BLE001  # what it is, the test says
        said = f"{type(error).__name__}: {error}"
    line = json.dumps([int(env["SLURM_PROCID"]), said, time.monotonic() - began])
    os.write(1, f"{line}\n".encode())


def main(hosts: Sequence[str], what: str) -> int:
    """Start the tasks of one case, and wait for all."""
    squatter = os.fork() if what == "port in use" else 0
    if what == "port in use" and not squatter:
        enter(hosts[0])
        with socket.create_server(("", 23456)):
            time.sleep(60)
        os._exit(0)
    time.sleep(0.3 if squatter else 0)
    ranks = {"first host missing": range(4, 8), "second host missing": range(4)}.get(what, range(8))
    children = []
    for rank in ranks:
        env = step(rank)
        if what == "wrong world size" and rank >= PER_HOST:
            env |= {"SLURM_STEP_NUM_TASKS": "12", "SLURM_STEP_TASKS_PER_NODE": "4(x3)"}
            time.sleep(1.0 * (rank == 7))  # it comes when rank 0 has rejected the others, and is to hear it, too
        if what == "no such name":
            env["MASTER_ADDR"] = "no-such-host.invalid"
        if child := os.fork():
            children.append(child)
        else:
            task(hosts[rank // PER_HOST], env, what)
            os._exit(0)
    if what == "link cut":
        time.sleep(4)
        subprocess.run(["ip", "-n", hosts[0], "link", "set", "eth0", "down"], check=True)
    for child in children:
        os.waitpid(child, 0)
    if squatter:
        os.kill(squatter, signal.SIGKILL)
        os.waitpid(squatter, 0)
    return 0
