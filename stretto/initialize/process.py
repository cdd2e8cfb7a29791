"""`initialize`: from the launch environment to a process that is ready in its world, and out again."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Literal

import torch
from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

from stretto.initialize import settings
from stretto.initialize.environment import Launch, detect
from stretto.initialize.failure_watch import LEARN_SECONDS, REQUEST_SECONDS, failing_with_peers
from stretto.initialize.failures import is_consequence
from stretto.initialize.group import default_group, require_no_group
from stretto.initialize.rendezvous import Meeting, rendezvous
from stretto.initialize.roll_call import Server, call_roll
from stretto.initialize.timeline import StartTimeline
from stretto.store import LostError, TimedStore, last_resort
from stretto.world import World

SLACK_SECONDS = 15.0
"""How long after its time-out a back end may take to say that a group was not made."""


@contextmanager
def initialize(
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    timeout: float = 600.0,
    start_timeout: float = 120.0,
    threads: int | None = None,
    seed: int | None = None,
    deterministic: bool = False,
    tf32: bool = False,
    timeline: StartTimeline | None = None,
    env: Mapping[str, str] | None = None,
    met: Meeting | None = None,
) -> Iterator[World]:
    """Yield the `World` of this job, with the default process group made; leave it at the end.

    Args:
        device: "cuda" takes the GPU of this process's local rank, and NCCL for its tensors beside Gloo for CPU's.
        timeout: seconds after which a collective that a rank has not joined is an error.
        start_timeout: seconds within which all ranks must have arrived.
        threads: of one CPU operation; by default this node's cores shared by its ranks, or OMP_NUM_THREADS.
        seed: for the global generators of Python, NumPy and torch.
        deterministic: allow only kernels that give the same bits each time.
        tf32: whether fp32 GEMMs may round their factors to TF32.
        timeline: gets the phases "rendezvous" and "groups".
        env: read in place of `os.environ`.
        met: what `rendezvous` gave, where the ranks have met already.

    A process alone (plain python, or a world of one) makes no process group. When the body raises on one rank, it
    ends on all within 15 s. All process-wide settings are put back.

    Raises:
        LaunchError: the environment contradicts itself; the message names the variables.
        RendezvousError: ranks are missing, or cannot be reached, or disagree.
        PeerFailedError: the body broke because another rank had failed; the message ends with its traceback.
    """
    launch = detect(os.environ if env is None else env)
    with ExitStack() as stack:
        if launch.local_size == launch.size:
            stack.enter_context(settings.variables(**settings.loopback()))
        stack.enter_context(settings.threads(threads or _threads(launch)))
        if deterministic:
            stack.enter_context(settings.determinism())
        stack.enter_context(settings.matmul_precision(tf32=tf32))
        if device == "cuda":  # before the first touch of a GPU, as it is read then
            stack.enter_context(settings.variables(**settings.allocator()))
        place = _device(device, launch)
        if place.type == "cuda":
            stack.enter_context(settings.affinity(settings.cpus_near(place)))
            # A pipeline's messages of one direction come in one order on purpose, see stretto.pipeline_parallel.link.
            stack.enter_context(settings.variables(TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING="false"))
        if seed is not None:
            stack.enter_context(settings.seeds(seed))
        if launch.size == 1:
            yield replace(World.single(place), source=launch.source)
            return
        require_no_group()  # the other ranks would wait for one that cannot come
        timeline = timeline or StartTimeline()
        with timeline.phase("rendezvous"):
            store, server = met or stack.enter_context(rendezvous(launch, timeout=start_timeout))
        # The groups, too, are made and left within: a rank may be lost then as well.
        now = timeline
        stack.enter_context(
            failing_with_peers(store, launch.rank, launch.size, phase=lambda: now.current, served_by=server)
        )
        absent = partial(_absent, store, server, launch)
        limit = timeout + SLACK_SECONDS

        def hanging() -> str:
            why = absent() or f"{server} is not heard"
            return f"rank {launch.rank}: the default group was not made within {limit:g} s: {why}"

        with timeline.phase("groups"), last_resort(limit, hanging):
            world = stack.enter_context(_default_group(launch, store, place, timeout))
        yield replace(world, server=str(server), absent=absent, lost=is_consequence, timeout=timeout)


def _absent(store: Store, server: Server, launch: Launch) -> str:
    """Ranks that do not answer, in a sentence; empty where all do."""
    try:
        line = TimedStore(store.clone(), REQUEST_SECONDS)  # type: ignore[attr-defined]
        found = str(call_roll(line, launch.size) or "")
        if launch.rank == 0:
            time.sleep(LEARN_SECONDS)  # the store may end with this process: the others ask it, too
    except (DistError, LostError):
        return server.silent_to(launch.rank)
    return found


def _default_group(launch: Launch, store: Store, device: torch.device, timeout: float) -> AbstractContextManager[World]:
    return default_group(
        launch.rank,
        launch.size,
        store,
        device=device,
        timeout=timedelta(seconds=timeout),
        local_rank=launch.local_rank,
        local_size=launch.local_size,
        source=launch.source,
    )


def _threads(launch: Launch) -> int:
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdecimal() and int(said) else max(1, settings.cores() // launch.local_size)


def _device(kind: str, launch: Launch) -> torch.device:
    """This process's device; a GPU is made current, before anything could touch another one."""
    if kind != "cuda":
        return torch.device(kind)
    count = torch.cuda.device_count()
    # Some launchers show each process its own GPU alone, under the number 0.
    index = 0 if count == 1 and launch.local_size > 1 and _one_gpu_each() else launch.local_rank
    if index >= count:
        raise RuntimeError(
            f"rank {launch.rank} is local rank {launch.local_rank} of {launch.local_size}, but this process sees "
            f"{count} CUDA devices (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}): "
            "start at most one process per GPU, or use device='cpu'"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _one_gpu_each() -> bool:
    """Whether the launcher chose this process's GPU (SLURM's --gpus-per-task and --gpu-bind, PALS, a wrapper)."""
    return "CUDA_VISIBLE_DEVICES" in os.environ
