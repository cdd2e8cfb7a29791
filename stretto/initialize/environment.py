"""Which process of which job is this? Read from the variables that launchers set; pure, and without torch.

    launch = detect(os.environ)        # Launch(source='srun', rank=5, size=8, local_rank=1, local_size=4, ...)

The innermost launcher started this process. RANK and its like are torchrun's, and are also exported by hand: there
they must repeat what the launcher says, or say what it leaves open.
"""

from __future__ import annotations

import os
import re
import zlib
from dataclasses import dataclass

from stretto.initialize.launchers import SLURM, TORCHRUN, Env, Launcher, first_host, started, tasks_of_nodes

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_PORT = 65_535


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


def detect(env: Env, *, parent: int | None = None) -> Launch:
    """This process's place, from its environment variables.

    `parent` is the parent's process id: what local processes of an MPI launcher have in common when nothing else
    names their job. Raises `LaunchError` with all problems found.
    """
    outer = next(iter(started(env)), None)  # further out, mpirun's variables describe its daemons
    launcher = _innermost(env, outer)
    if launcher is None:
        return Launch("python")
    reader = _Reader(env)
    launch = _place(launcher, reader, os.getppid() if parent is None else parent)
    if launcher is TORCHRUN and outer is not None:
        _require_an_agent_per_task(outer, reader)
    elif launch is not None and launcher is not TORCHRUN:
        _require_repetition(launcher, launch, reader)
    if launch is None or reader.problems:
        raise LaunchError(reader.problems)
    return launch


def _innermost(env: Env, outer: Launcher | None) -> Launcher | None:
    """Whose variables say where this process is. By hand a single task may be divided further, whole."""
    exported = [name in env for name in (TORCHRUN.rank, TORCHRUN.size)]
    alone = outer is None or (all(exported) and env.get(outer.size, "").strip() == "1")
    if _has_agent(env) or (any(exported) and alone):
        return TORCHRUN
    return outer


def _has_agent(env: Env) -> bool:
    """Whether torchrun, or `stretto train --nproc`, has started this process, and nobody's `export`."""
    return "TORCHELASTIC_RUN_ID" in env or "STRETTO_LAUNCHER" in env


class _Reader:
    """Reads variables and collects what is wrong with them."""

    def __init__(self, env: Env) -> None:
        self.env = env
        self.problems: list[str] = []

    def first(self, *names: str) -> str | None:
        """The first of these variables that is set."""
        return next((name for name in names if name in self.env), None)

    def integer(self, *names: str, low: int = 0, high: int = 10**9) -> int | None:
        """The integer in the first of these variables that is set; None, and noted, when there is none."""
        name = self.first(*names)
        if name is None:
            self.problems.append(f"{names[0]} is not set")
            return None
        text = self.env[name]
        if re.fullmatch(r"\s*\d{1,18}\s*", text) and low <= int(text) <= high:
            return int(text)
        needs = f"an integer >= {low}" if high == 10**9 else f"from {low} to {high}"
        self.problems.append(f"{name}={text!r} is not {needs}")
        return None


def _place(launcher: Launcher, reader: _Reader, parent: int) -> Launch | None:
    env = reader.env
    ranks, sizes = (launcher.rank, TORCHRUN.rank), (launcher.size, TORCHRUN.size)
    for some, others in ((ranks, sizes), (sizes, ranks)):
        one = reader.first(*some)
        if one and not reader.first(*others):
            reader.problems.append(f"{one}={env[one]} is set, but {others[0]} is not: set both or neither")
            return None
    rank, size = reader.integer(*ranks), reader.integer(*sizes, low=1)
    if rank is not None and size is not None and rank >= size:
        reader.problems.append(f"{reader.first(*ranks)}={rank} is not below {reader.first(*sizes)}={size}")
    if size is None:
        return None
    addr = _address(launcher, reader, size)
    local_rank, local_size = _local_place(launcher, reader, rank or 0, size, addr)
    return Launch(
        env.get("STRETTO_LAUNCHER", launcher.source) if launcher is TORCHRUN else launcher.source,
        rank or 0,
        size,
        local_rank,
        local_size,
        addr,
        _port(launcher, reader, size, parent),
        env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        (reader.integer("TORCHELASTIC_RESTART_COUNT") or 0) if "TORCHELASTIC_RESTART_COUNT" in env else 0,
    )


def _local_place(launcher: Launcher, reader: _Reader, rank: int, size: int, addr: str) -> tuple[int, int]:
    """(local rank, ranks on this node)."""
    env = reader.env
    ranks, sizes = (launcher.local_rank, TORCHRUN.local_rank), (launcher.local_size, TORCHRUN.local_size)
    if launcher is TORCHRUN and not reader.first(*ranks, *sizes):
        # A pod that serves the rendezvous itself may be told that it is at localhost; the other pods are not.
        first_pod = "KUBERNETES_SERVICE_HOST" in env and rank == 0
        here = size == 1 or (addr in LOOPBACK and not first_pod)
        return (rank, size) if here else (0, 1)  # without a word about the host, a host has one process
    local_rank = reader.integer(*ranks)
    if launcher is SLURM and SLURM.local_size in env and size > 1:
        local_size, name = _tasks_on_node(reader, size), "the tasks of this node by SLURM_STEP_TASKS_PER_NODE, "
    elif (launcher is SLURM or addr in LOOPBACK) and size == 1 and not reader.first(*sizes):
        local_size, name = 1, ""
    else:
        local_size, name = reader.integer(*sizes, low=1), f"{reader.first(*sizes)}="
        if local_size is not None and local_size > size:
            reader.problems.append(f"{name}{local_size} is above {reader.first(launcher.size, TORCHRUN.size)}={size}")
    if local_rank is not None and local_size is not None and local_rank >= local_size and name:
        reader.problems.append(f"{reader.first(*ranks)}={local_rank} is not below {name}{local_size}")
    return local_rank or 0, local_size or 1


def _tasks_on_node(reader: _Reader, size: int) -> int | None:
    """Tasks of this step on this node."""
    text = reader.env[SLURM.local_size]
    try:
        runs = tasks_of_nodes(text)
    except ValueError as error:
        reader.problems.append(f"{SLURM.local_size}={error}")
        return None
    if (total := sum(n * times for n, times in runs)) != size:
        said = reader.first(SLURM.size, TORCHRUN.size)
        reader.problems.append(f"{SLURM.local_size}={text} sums to {total}, but {said}={size}")
    if (node := reader.integer("SLURM_NODEID")) is None:
        return None
    left = node
    for n, times in runs:
        if left < times:
            return n
        left -= times
    reader.problems.append(f"SLURM_NODEID={node} is beyond the nodes of {SLURM.local_size}={text}")
    return None


def _address(launcher: Launcher, reader: _Reader, size: int) -> str:
    """The host of rank 0."""
    env = reader.env
    if addr := env.get("MASTER_ADDR", "").strip():
        if problem := _no_host(addr):
            reader.problems.append(f"MASTER_ADDR={addr} {problem}")
        return addr
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
            f"{reader.first(launcher.size, TORCHRUN.size)}={size}, but MASTER_ADDR does not say on which host rank 0 is"
            + ("" if launcher is TORCHRUN else "; set it, with -x MASTER_ADDR=... or -genv MASTER_ADDR ...")
        )
    return ""


def _no_host(addr: str) -> str:
    """Why this is neither a name nor an address; empty when it may be one. An IPv6 address has many colons."""
    with_port = re.fullmatch(r"(?:\w+://)?(?:\[([^]]*)\]|([^:/]*)):(\d+)/?", addr)
    if with_port:
        host = with_port[1] or with_port[2]
        return f"has a port in it: set MASTER_ADDR={host} and MASTER_PORT={with_port[3]}"
    if addr.count(":") == 1 or re.search(r"[\s/\[\],]", addr):
        return "is neither a host name nor an address"
    return ""


def _port(launcher: Launcher, reader: _Reader, size: int, parent: int) -> int:
    """MASTER_PORT, or a port that all processes of the job derive alike, below the system's ephemeral ones."""
    if reader.env.get("MASTER_PORT"):
        return reader.integer("MASTER_PORT", low=1, high=MAX_PORT) or 0
    if size == 1:
        return 0
    if launcher is TORCHRUN:
        reader.problems.append(f"WORLD_SIZE={size}, but MASTER_PORT is not set")
        return 0
    job = [reader.env[name] for name in launcher.job if name in reader.env]
    return 10_000 + zlib.crc32(" ".join(job or [str(parent)]).encode()) % 22_000


def _require_an_agent_per_task(outer: Launcher, reader: _Reader) -> None:
    """An outer launcher starts one torchrun on each node, or one process that starts workers of its own."""
    if not _has_agent(reader.env):
        return
    tasks = reader.integer(outer.size, low=1)
    agents = reader.integer("GROUP_WORLD_SIZE", low=1)
    if None not in (tasks, agents) and tasks not in (1, agents):
        reader.problems.append(
            f"{outer.source} started {outer.size}={tasks} processes, but torchrun runs on "
            f"GROUP_WORLD_SIZE={agents} nodes: start one torchrun per node, with --nnodes {tasks}"
        )


def _require_repetition(launcher: Launcher, launch: Launch, reader: _Reader) -> None:
    """What was exported by hand must repeat what the launcher says."""
    env = reader.env
    for name, value, other in (
        (TORCHRUN.size, launch.size, launcher.size),
        (TORCHRUN.rank, launch.rank, launcher.rank),
        (TORCHRUN.local_rank, launch.local_rank, launcher.local_rank),
        (TORCHRUN.local_size, launch.local_size, launcher.local_size),
    ):
        if name in env and other in env and env[name].strip() != str(value):
            reader.problems.append(
                f"{name}={env[name]} contradicts {other}={env[other]} of {launcher.source}: unset one of them"
            )
