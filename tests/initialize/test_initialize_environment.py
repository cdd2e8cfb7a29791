"""Tables of the variables that launchers set, and what they mean."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.initialize.environment import Launch, LaunchError, detect
from stretto.initialize.launchers import first_host

pytestmark = pytest.mark.pure

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_NTASKS": "11",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_STEP_NODELIST": "gpu-[007-008,012]",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-a-17@1",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}
PALS = {"PMI_RANK": "3", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2", "MASTER_ADDR": "x1"}
POD = {"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "job-0", "MASTER_PORT": "23456", "KUBERNETES_SERVICE_HOST": "x"}
BATCH_SCRIPT = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "16"}
SALLOC_SHELL = SRUN | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}


def where(launch: Launch) -> tuple[str, int, int, int, int, str]:
    return (
        launch.source,
        launch.rank,
        launch.size,
        launch.local_rank,
        launch.local_size,
        launch.master_addr,
    )


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, ("python", 0, 1, 0, 1, "127.0.0.1")),
        (TORCHRUN, ("torchrun", 5, 8, 1, 4, "node0")),
        (SRUN, ("srun", 9, 11, 1, 3, "gpu-007")),
        (SRUN | {"SLURM_NODEID": "1"}, ("srun", 9, 11, 1, 4, "gpu-007")),
        (SRUN | {"MASTER_ADDR": "10.0.0.7"}, ("srun", 9, 11, 1, 3, "10.0.0.7")),
        (OPEN_MPI, ("mpirun (Open MPI)", 1, 4, 1, 4, "127.0.0.1")),
        (HYDRA, ("mpiexec (MPICH)", 3, 4, 3, 4, "127.0.0.1")),
        (PALS, ("mpiexec (PALS)", 3, 8, 1, 2, "x1")),
        (BATCH_SCRIPT, ("python", 0, 1, 0, 1, "127.0.0.1")),
        (SALLOC_SHELL, ("python", 0, 1, 0, 1, "127.0.0.1")),
        # srun --mpi=pmi2 sets PMI_RANK as well
        (SRUN | {"PMI_RANK": "9", "PMI_SIZE": "11"}, ("srun", 9, 11, 1, 3, "gpu-007")),
        # srun started one torchrun on each of two nodes
        (
            SRUN | TORCHRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
            ("torchrun", 5, 8, 1, 4, "node0"),
        ),
        # mpirun starts its daemons with srun, whose variables its ranks inherit
        (SRUN | OPEN_MPI, ("mpirun (Open MPI)", 1, 4, 1, 4, "127.0.0.1")),
        # exported by hand for processes of this machine
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            ("torchrun", 1, 2, 1, 2, "localhost"),
        ),
        # exported by hand from what srun says
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            | {"MASTER_ADDR": "a", "MASTER_PORT": "1", "SLURM_STEP_NUM_TASKS": "2"}
            | {"SLURM_PROCID": "1", "SLURM_LOCALID": "0"},
            ("srun", 1, 2, 0, 1, "a"),
        ),
        # what is not exported comes from srun
        (SRUN | {"WORLD_SIZE": "11", "MASTER_ADDR": "a"}, ("srun", 9, 11, 1, 3, "a")),
        (SRUN | {"WORLD_SIZE": "11", "RANK": "9", "LOCAL_RANK": "1"}, ("srun", 9, 11, 1, 3, "gpu-007")),
        # by hand inside of mpirun, whose daemons srun started
        (SRUN | OPEN_MPI | {"RANK": "1", "WORLD_SIZE": "4"}, ("mpirun (Open MPI)", 1, 4, 1, 4, "127.0.0.1")),
        # one process in each pod: the usual four variables; the pod of rank 0 may be told localhost
        (POD, ("torchrun", 2, 4, 0, 1, "job-0")),
        (POD | {"RANK": "0", "MASTER_ADDR": "localhost"}, ("torchrun", 0, 4, 0, 1, "localhost")),
        (POD | {"MASTER_ADDR": "fe80::1"}, ("torchrun", 2, 4, 0, 1, "fe80::1")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ("torchrun", 0, 1, 0, 1, "127.0.0.1")),
    ],
)
def test_place(env: dict[str, str], expected: tuple[str, int, int, int, int, str]) -> None:
    assert where(detect(env)) == expected


def test_torchrun_serves_the_store_and_counts_attempts() -> None:
    launch = detect(TORCHRUN)
    assert (launch.agent_store, launch.attempt, launch.master_port) == (True, 2, 29500)


def without(env: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in names}


@pytest.mark.parametrize(
    ("env", "names"),
    [
        (without(TORCHRUN, "WORLD_SIZE"), ("RANK=5", "WORLD_SIZE is not")),
        (without(TORCHRUN, "RANK"), ("WORLD_SIZE=8", "RANK is not")),
        (TORCHRUN | {"RANK": "8"}, ("RANK=8", "WORLD_SIZE=8")),
        (TORCHRUN | {"RANK": "five"}, ("RANK='five'",)),
        (TORCHRUN | {"RANK": "-1"}, ("RANK='-1'",)),
        (TORCHRUN | {"WORLD_SIZE": "0"}, ("WORLD_SIZE='0'",)),
        (TORCHRUN | {"LOCAL_RANK": "4"}, ("LOCAL_RANK=4", "LOCAL_WORLD_SIZE=4")),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, ("LOCAL_WORLD_SIZE=9", "WORLD_SIZE=8")),
        (without(TORCHRUN, "MASTER_ADDR"), ("WORLD_SIZE=8", "MASTER_ADDR")),
        (without(TORCHRUN, "MASTER_PORT"), ("WORLD_SIZE=8", "MASTER_PORT")),
        (TORCHRUN | {"MASTER_PORT": "http"}, ("MASTER_PORT='http'",)),
        (TORCHRUN | {"MASTER_PORT": "99999"}, ("MASTER_PORT='99999' is not from 1 to 65535",)),
        (TORCHRUN | {"MASTER_PORT": "0"}, ("MASTER_PORT='0'",)),
        (TORCHRUN | {"MASTER_ADDR": "10.0.0.1:29500"}, ("MASTER_ADDR=10.0.0.1:29500", "MASTER_ADDR=10.0.0.1 and MAST")),
        (TORCHRUN | {"MASTER_ADDR": "[::1]:29500"}, ("has a port in it: set MASTER_ADDR=::1",)),
        (TORCHRUN | {"MASTER_ADDR": "tcp://n1:1"}, ("set MASTER_ADDR=n1 and MASTER_PORT=1",)),
        (TORCHRUN | {"MASTER_ADDR": "two words"}, ("neither a host name nor an address",)),
        (SRUN | {"LOCAL_RANK": "0"}, ("LOCAL_RANK=0 contradicts SLURM_LOCALID=1",)),
        (SRUN | {"LOCAL_WORLD_SIZE": "4"}, ("LOCAL_WORLD_SIZE=4", "SLURM_STEP_TASKS_PER_NODE=4(x2),3")),
        (without(SRUN, "SLURM_STEP_TASKS_PER_NODE"), ("SLURM_STEP_TASKS_PER_NODE is not set",)),
        (without(TORCHRUN, "LOCAL_RANK"), ("LOCAL_RANK is not set",)),
        # one torchrun per GPU in place of one per node
        (SRUN | TORCHRUN | {"SLURM_STEP_NUM_TASKS": "8"}, ("SLURM_STEP_NUM_TASKS=8", "GROUP_WORLD_SIZE=2")),
        # a stale export in a shell's start-up file
        (SRUN | {"RANK": "0", "WORLD_SIZE": "1"}, ("WORLD_SIZE=1", "SLURM_STEP_NUM_TASKS=11")),
        (SRUN | {"RANK": "0", "WORLD_SIZE": "1"}, ("RANK=0", "SLURM_PROCID=9")),
        (OPEN_MPI | {"RANK": "0", "WORLD_SIZE": "1"}, ("WORLD_SIZE=1", "OMPI_COMM_WORLD_SIZE=4")),
        (HYDRA | {"RANK": "0", "WORLD_SIZE": "1"}, ("WORLD_SIZE=1", "PMI_SIZE=4")),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, ("OMPI_COMM_WORLD_SIZE=4", "MASTER_ADDR")),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, ("TASKS_PER_NODE=4(x2) sums to 8", "NUM_TASKS=11")),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "four"}, ("SLURM_STEP_TASKS_PER_NODE='four'",)),
        (SRUN | {"SLURM_NODEID": "3"}, ("SLURM_NODEID=3", "SLURM_STEP_TASKS_PER_NODE")),
        (without(SRUN, "SLURM_STEP_NODELIST"), ("MASTER_ADDR", "SLURM_STEP_NODELIST")),
        (without(SRUN, "SLURM_PROCID"), ("SLURM_STEP_NUM_TASKS=11", "SLURM_PROCID is not")),
    ],
)
def test_contradictions_are_rejected_naming_the_variables(env: dict[str, str], names: tuple[str, ...]) -> None:
    with pytest.raises(LaunchError) as caught:
        detect(env)
    for name in names:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    "env",
    [
        SRUN | {"WORLD_SIZE": "8"},
        SRUN | {"RANK": "0"},
        POD | {"LOCAL_RANK": "7"},
        OPEN_MPI | {"WORLD_SIZE": "5"},
        without(TORCHRUN, "LOCAL_WORLD_SIZE") | {"LOCAL_RANK": "9"},
    ],
)
def test_a_value_that_is_named_is_one_that_a_variable_has(env: dict[str, str]) -> None:
    """Catches: a default in a message, as if somebody had set it."""
    with pytest.raises(LaunchError) as caught:
        detect(env)
    for name, value in re.findall(r"\b([A-Z][A-Z_]+)='?([^ ',:]*)", str(caught.value)):
        assert env.get(name, "").startswith(value), str(caught.value)
        assert name in env, str(caught.value)


def test_all_problems_at_once() -> None:
    with pytest.raises(LaunchError) as caught:
        detect(without(TORCHRUN, "MASTER_ADDR", "MASTER_PORT") | {"RANK": "9", "LOCAL_RANK": "x"})
    assert len(caught.value.problems) == 4


@given(st.sampled_from([SRUN, OPEN_MPI, HYDRA]), st.integers(0, 2**20))
def test_all_ranks_derive_one_port_below_the_ephemeral_ones(env: dict[str, str], parent: int) -> None:
    ports = {
        detect(env | {name: "0"}, parent=parent).master_port
        for name in ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
    }
    assert len(ports) == 1
    assert 10_000 <= ports.pop() < 32_000


def test_two_jobs_take_different_ports() -> None:
    assert detect(SRUN).master_port != detect(SRUN | {"SLURM_JOB_ID": "1235"}).master_port
    assert detect(HYDRA, parent=17).master_port != detect(HYDRA, parent=18).master_port


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node", "node"),
        ("a,b", "a"),
        ("gpu-[07-09,12],login", "gpu-07"),
        ("r[1-2]n[3-4]", "r1n3"),
        ("gpu[5]-ib,b", "gpu5-ib"),
        ("", ""),
    ],
)
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_detection_needs_no_torch() -> None:
    code = "import sys; from stretto.initialize import detect; detect({}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
