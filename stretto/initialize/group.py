"""Joining torch's default process group, and leaving it again: also on errors, and never waiting for ever."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from stretto.world import World

LEAVE_SECONDS = 2.0
"""How long a failing process tries to leave its groups in good order before it leaves without."""


def backend_for(device: torch.device) -> str:
    """Back ends by kind of tensor: NCCL needs GPU tensors, and a CUDA run still exchanges CPU ones."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


@contextmanager
def default_group(
    rank: int,
    size: int,
    store: Store,
    *,
    device: torch.device,
    timeout: timedelta,
    local_rank: int = 0,
    local_size: int = 1,
    source: str = "",
) -> Iterator[World]:
    """Make the default process group of `size` ranks over `store` and yield the `World` of all of them.

    On a clean exit the group is destroyed. When the body raises, the peers may never answer again, so the
    communicators are aborted, for at most `LEAVE_SECONDS`: the caller's exception is what matters then.

    Raises `RuntimeError` when this process is in a default group already.
    """
    require_no_group()
    backend = backend_for(device)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield World(rank, size, local_rank, local_size, device, backend, tuple(range(size)), store, source)
    except BaseException:
        _leave_at_once()
        raise
    dist.destroy_process_group()


def require_no_group() -> None:
    """Raise `RuntimeError` when this process is in a default group already."""
    if dist.is_initialized():
        raise RuntimeError(
            "this process is already in a default process group: leave it first, with "
            "torch.distributed.destroy_process_group(), or go on with the world of the stretto.initialize() before"
        )


def _leave_at_once() -> None:
    """Abort all communicators from a thread of its own, since even that may wait for a peer that is gone."""

    def leave() -> None:
        if (world := dist.group.WORLD) is not None:
            world.abort()
            dist.destroy_process_group()

    thread = threading.Thread(target=leave, name="stretto-leave", daemon=True)
    thread.start()
    thread.join(LEAVE_SECONDS)


def largest(world: World, value: int) -> int:
    """The largest value that any rank of the world of `initialize` gives: an exit code that all return, say."""
    if world.size == 1:
        return value
    given = torch.tensor(value)
    dist.all_reduce(given, dist.ReduceOp.MAX)
    return int(given)
