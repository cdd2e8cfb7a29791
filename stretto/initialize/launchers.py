"""What launchers set: one row of names each, and the lists that SLURM writes; pure, and without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

Env = Mapping[str, str]


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

PROGRAMS = (OPEN_MPI, MVAPICH, HYDRA, PALS, SLURM)
"""Launchers with variables of their own, innermost first: each may have been started by one further down. torchrun's
are also what people export by hand."""

INTERACTIVE_STEP = "4294967290"
"""SLURM_STEP_ID of the shell that salloc opens (slurm.h: SLURM_INTERACTIVE_STEP): not a rank of anything."""


def started(env: Env) -> list[Launcher]:
    """The launchers with variables of their own that have left them here, innermost first."""
    return [launcher for launcher in PROGRAMS if _present(launcher, env)]


def _present(launcher: Launcher, env: Env) -> bool:
    if launcher is SLURM:
        # A batch script has SLURM_PROCID=0 as well; only what srun starts has the step's number of tasks.
        return "SLURM_STEP_NUM_TASKS" in env and env.get("SLURM_STEP_ID") != INTERACTIVE_STEP
    if launcher is PALS or launcher is HYDRA:
        # Both set PMI_RANK, and so does srun --mpi=pmi2: the local variables tell them apart.
        return launcher.rank in env and launcher.local_rank in env
    return launcher.rank in env or launcher.size in env


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: "gpu-[07-09,12],login" -> "gpu-07"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes.strip())
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0]) if first else ""


def tasks_of_nodes(text: str) -> list[tuple[int, int]]:
    """Runs of nodes, from a list such as "4(x2),3" -> [(4, 2), (3, 1)]; ValueError when it is none."""
    if not re.fullmatch(r"\d{1,9}(\(x\d{1,9}\))?(,\d{1,9}(\(x\d{1,9}\))?)*", text):
        raise ValueError(f"{text!r} is not a list such as '4(x2),3'")
    return [(int(n), int(times or 1)) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text)]
