"""Two network namespaces are two hosts: ranks that share nothing but a wire."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gloo, pytest.mark.nightly]

PROGRAM = Path(__file__).with_name("two_hosts_program.py")
PORT = 29_471


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@pytest.fixture
def hosts() -> Iterator[list[tuple[str, str, str]]]:
    """Name, address and interface of two hosts with a wire between them; gone afterwards."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs root and iproute2 to make network namespaces")
    tag = f"{os.getpid():x}"
    found = [(f"stretto-{tag}-{i}", f"10.77.0.{i + 1}", f"st{tag}{i}") for i in range(2)]
    with ExitStack() as undo:
        for name, _, _ in found:
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
            undo.callback(ip, "netns", "del", name)
        ip("link", "add", found[0][2], "netns", found[0][0], "type", "veth", "peer", found[1][2], "netns", found[1][0])
        for name, address, interface in found:
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            ip("-n", name, "link", "set", interface, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield found


def test_groups_inside_and_across_two_hosts(hosts: list[tuple[str, str, str]]) -> None:
    ranks = []
    for rank in range(4):
        name, _, interface = hosts[rank // 2]
        env = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": "4",
            "LOCAL_RANK": str(rank % 2),
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": hosts[0][1],
            "MASTER_PORT": str(PORT),
            "GLOO_SOCKET_IFNAME": interface,
            "OMP_NUM_THREADS": "1",
        }
        command = ["ip", "netns", "exec", name, sys.executable, str(PROGRAM)]
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    said = []
    try:
        for rank in ranks:
            out, errors = rank.communicate(timeout=90)
            assert rank.returncode == 0, errors
            said += out.splitlines()
    finally:
        for rank in ranks:
            rank.kill()
    assert sorted(said) == sorted(
        [
            *("rank 0 tp 11", "rank 1 tp 11", "rank 2 tp 1100", "rank 3 tp 1100"),  # inside a host
            *("rank 0 pp 101", "rank 1 pp 1010", "rank 2 pp 101", "rank 3 pp 1010"),  # from host to host
        ]
    )
