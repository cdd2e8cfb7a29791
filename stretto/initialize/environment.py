"""Which process of which job is this? Read from the variables that launchers set; pure, and without torch.

    launch = detect(os.environ)        # Launch(source='srun', rank=5, size=8, local_rank=1, local_size=4, ...)

Each launcher is one row of `LAUNCHERS`. Where several have left their variables (torchrun under srun, mpirun in
a SLURM job) the innermost one started this process; what the outer ones say must still fit, or is refused.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

LOOPBACK = ("127.0.0.1", "localhost", "::1")

Env = Mapping[str, str]


class LaunchError(ValueError):
    """The launch environment contradicts itself or lacks something; the message names the variables."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("cannot tell which rank this process is:\n" + "\n".join(f"  - {p}" for p in problems))
        self.problems = tuple(problems)


@dataclass(frozen=True)
class Launch:
    """One process's place among the processes of its job, and where they all meet."""

    source: str
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    agent_store: bool = False
    """True when the launcher serves the store itself, so that rank 0 joins it like the others."""
    attempt: int = 0
    """How often the launcher has restarted this job: keys of an earlier attempt must not be read."""

    def __str__(self) -> str:
        place = f"rank {self.rank} of {self.size}, local rank {self.local_rank} of {self.local_size}"
        return f"{place}, by {self.source}, meeting at {self.master_addr}:{self.master_port}"


@dataclass(frozen=True)
class Launcher:
    """The names of one launcher's variables."""

    source: str
    rank: str
    size: str
    local_rank: str
    local_size: str
    job: tuple[str, ...] = ()
    """Variables that together name the job: all its processes derive the same port from them."""

    def places(self) -> tuple[str, str, str, str]:
        """The four variables that say where a process is."""
        return self.rank, self.size, self.local_rank, self.local_size


TORCHRUN = Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
OPEN_MPI = Launcher(
    "mpirun (Open MPI)",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
)
MVAPICH = Launcher(
    "mpirun (MVAPICH2)",
    "MV2_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_SIZE",
)
HYDRA = Launcher("mpiexec (MPICH)", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", ("PMI_JOBID",))
PALS = Launcher("mpiexec (PALS)", "PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE", ("PALS_APID",))
SLURM = Launcher(
    "srun",
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_LOCALID",
    "SLURM_STEP_TASKS_PER_NODE",
    ("SLURM_JOB_ID", "SLURM_STEP_ID"),
)

LAUNCHERS = (TORCHRUN, OPEN_MPI, MVAPICH, HYDRA, PALS, SLURM)
"""Innermost first: each may have been started by one further down."""

INTERACTIVE_STEP = "4294967290"
"""SLURM_STEP_ID of the shell that salloc opens (slurm.h: SLURM_INTERACTIVE_STEP): not a rank of anything."""


def detect(env: Env, *, parent: int | None = None) -> Launch:
    """This process's place, from its environment variables.

    `parent` is the parent's process id: what local processes of an MPI launcher have in common when nothing else
    names their job. Raises `LaunchError` with all problems found.
    """
    present = [launcher for launcher in LAUNCHERS if _present(launcher, env)]
    if not present:
        return Launch("python")
    reader = _Reader(env)
    launch = _place(present[0], reader, os.getppid() if parent is None else parent)
    for outer in present[1:]:
        _compare(present[0], outer, launch, reader)
    if reader.problems:
        raise LaunchError(reader.problems)
    return launch


def _present(launcher: Launcher, env: Env) -> bool:
    if launcher is SLURM:
        # A batch script has SLURM_PROCID=0 as well; only what srun starts has the step's number of tasks.
        return "SLURM_STEP_NUM_TASKS" in env and env.get("SLURM_STEP_ID") != INTERACTIVE_STEP
    if launcher is PALS or launcher is HYDRA:
        # Both set PMI_RANK, and so does srun --mpi=pmi2: the local variables tell them apart.
        return launcher.rank in env and launcher.local_rank in env
    return launcher.rank in env or launcher.size in env


class _Reader:
    """Reads variables and collects what is wrong with them."""

    def __init__(self, env: Env) -> None:
        self.env = env
        self.problems: list[str] = []

    def integer(self, name: str, *, low: int = 0, default: int = 0) -> int:
        """The integer in a variable that must be there."""
        text = self.env.get(name)
        if text is None:
            self.problems.append(f"{name} is not set")
        elif not re.fullmatch(r"\s*\d+\s*", text) or int(text) < low:
            self.problems.append(f"{name}={text!r} is not an integer >= {low}")
        else:
            return int(text)
        return default

    def below(self, small: str, a: int, large: str, b: int) -> None:
        """Note it when a rank is not below its size."""
        if a >= b:
            self.problems.append(f"{small}={a} is not below {large}={b}")


def _place(launcher: Launcher, reader: _Reader, parent: int) -> Launch:
    for one, other in ((launcher.rank, launcher.size), (launcher.size, launcher.rank)):
        if one in reader.env and other not in reader.env:
            reader.problems.append(f"{one}={reader.env[one]} is set, but {other} is not: set both or neither")
            return Launch(launcher.source)
    rank = reader.integer(launcher.rank)
    size = reader.integer(launcher.size, low=1, default=rank + 1)
    reader.below(launcher.rank, rank, launcher.size, size)
    addr = _address(launcher, reader, size)
    local_rank, local_size = _local_place(launcher, reader, rank, size, addr)
    reader.below(launcher.local_rank, local_rank, launcher.local_size, local_size)
    if local_size > size:
        reader.problems.append(f"{launcher.local_size}={local_size} is above {launcher.size}={size}")
    env = reader.env
    return Launch(
        env.get("STRETTO_LAUNCHER", launcher.source) if launcher is TORCHRUN else launcher.source,
        rank,
        size,
        local_rank,
        local_size,
        addr,
        _port(launcher, reader, size, parent),
        env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        reader.integer("TORCHELASTIC_RESTART_COUNT") if "TORCHELASTIC_RESTART_COUNT" in env else 0,
    )


def _local_place(launcher: Launcher, reader: _Reader, rank: int, size: int, addr: str) -> tuple[int, int]:
    """(local rank, ranks on this node)."""
    env = reader.env
    if launcher is SLURM:
        local_rank = reader.integer(launcher.local_rank)
        return local_rank, _tasks_on_node(reader, size, local_rank)
    if launcher.local_rank not in env and launcher.local_size not in env and (size == 1 or addr in LOOPBACK):
        return rank, size  # set by hand for processes of this machine alone
    return (
        reader.integer(launcher.local_rank),
        reader.integer(launcher.local_size, low=1, default=size),
    )


def _tasks_on_node(reader: _Reader, size: int, local_rank: int) -> int:
    """Tasks of this step on this node, from a list such as "4(x2),3": two nodes with 4 tasks, one with 3."""
    if size == 1:
        return 1
    text = reader.env.get("SLURM_STEP_TASKS_PER_NODE", "")
    if not re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", text):
        reader.problems.append(f"SLURM_STEP_TASKS_PER_NODE={text!r} is not a list such as '4(x2),3'")
        return local_rank + 1
    runs = [(int(n), int(times or 1)) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text)]
    if (total := sum(n * times for n, times in runs)) != size:
        reader.problems.append(f"SLURM_STEP_TASKS_PER_NODE={text} sums to {total}, but SLURM_STEP_NUM_TASKS={size}")
    node = reader.integer("SLURM_NODEID")
    for n, times in runs:
        if node < times:
            return n
        node -= times
    reader.problems.append(
        f"SLURM_NODEID={reader.env.get('SLURM_NODEID')} is beyond the nodes of SLURM_STEP_TASKS_PER_NODE={text}"
    )
    return local_rank + 1


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: "gpu-[07-09,12],login" -> "gpu-07"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes.strip())
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0]) if first else ""


def _address(launcher: Launcher, reader: _Reader, size: int) -> str:
    """The host of rank 0."""
    env = reader.env
    if env.get("MASTER_ADDR"):
        return env["MASTER_ADDR"]
    if size == 1:
        return "127.0.0.1"
    if launcher is SLURM:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
        if host := first_host(nodes):
            return host
        reader.problems.append("neither MASTER_ADDR nor SLURM_STEP_NODELIST says on which host rank 0 is")
    elif launcher is not TORCHRUN and env.get(launcher.local_size) == env.get(launcher.size):
        return "127.0.0.1"
    else:
        reader.problems.append(
            f"{launcher.size}={size}, but MASTER_ADDR does not say on which host rank 0 is"
            + ("" if launcher is TORCHRUN else "; set it, with -x MASTER_ADDR=... or -genv MASTER_ADDR ...")
        )
    return ""


def _port(launcher: Launcher, reader: _Reader, size: int, parent: int) -> int:
    """MASTER_PORT, or a port that all processes of the job derive alike, below the system's ephemeral ones."""
    if reader.env.get("MASTER_PORT"):
        return reader.integer("MASTER_PORT", low=1)
    if size == 1:
        return 0
    if launcher is TORCHRUN:
        reader.problems.append(f"WORLD_SIZE={size}, but MASTER_PORT is not set")
        return 0
    job = [reader.env[name] for name in launcher.job if name in reader.env]
    return 10_000 + zlib.crc32(" ".join(job or [str(parent)]).encode()) % 22_000


def _compare(inner: Launcher, outer: Launcher, launch: Launch, reader: _Reader) -> None:
    """Does what an outer launcher says fit the place that the inner one gave?"""
    env = reader.env
    if inner is not TORCHRUN:
        return  # mpirun starts its daemons with srun, so that the variables of srun describe a daemon
    tasks = reader.integer(outer.size, low=1, default=1)
    if "TORCHELASTIC_RUN_ID" in env:  # a real torchrun: the outer launcher starts one on each node
        agents = reader.integer("GROUP_WORLD_SIZE", low=1, default=1)
        if tasks not in (1, agents):
            reader.problems.append(
                f"{outer.source} started {outer.size}={tasks} processes, but torchrun runs on "
                f"GROUP_WORLD_SIZE={agents} nodes: start one torchrun per node, with --nnodes {tasks}"
            )
    elif tasks > 1:  # RANK and its like were exported by hand, and must repeat what the launcher says
        for name, value, other in (
            ("WORLD_SIZE", launch.size, outer.size),
            ("RANK", launch.rank, outer.rank),
            ("LOCAL_RANK", launch.local_rank, outer.local_rank),
        ):
            if env.get(other, "").strip() != str(value):
                reader.problems.append(
                    f"{name}={value} contradicts {other}={env.get(other)} of {outer.source}: unset one of them"
                )
