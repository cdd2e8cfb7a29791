"""What one worker of the pool does: wait for a call, make a fresh process group for it, run it, answer."""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import resource
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.distributed.distributed_c10d import PrefixStore, Store

from stretto.initialize.failures import Failure
from stretto.initialize.group import default_group
from stretto.initialize.settings import loopback
from stretto.initialize.stores import TCPStore, listen, serve_on, tcp_store
from stretto.world import World


@dataclass(frozen=True)
class Request:
    """One call of the pool, as it travels to each of its ranks."""

    number: int
    size: int
    timeout: float
    filters: list[Any]
    fn: Callable[..., Any]
    args: tuple[Any, ...]


def stack_file(directory: Path, rank: int) -> Path:
    """Where the interpreter of a rank writes its stacks when it is ended by SIGABRT or a crash."""
    return directory / f"stacks-{rank}.txt"


def serve(rank: int, connection: Connection, directory: Path, device: str) -> None:
    """Answer calls until the pool closes the connection."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    stacks = stack_file(directory, rank).open("w")
    faulthandler.enable(stacks, all_threads=True)
    torch.set_num_threads(1)
    os.environ.update(loopback())
    store = _rendezvous(rank, connection)
    local = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if local.type == "cuda":
        torch.cuda.set_device(local)
    gc.freeze()  # what is imported stays: a collection looks at what calls leave
    while (request := _receive(connection)) is not None:
        _answer(request, rank, connection, store, local)
        gc.collect()  # process groups in a cycle keep their threads: hundreds, after some tests


def _rendezvous(rank: int, connection: Connection) -> TCPStore:
    """Rank 0 serves on a port of the system's choice and tells the pool, which tells the others: no race."""
    if rank == 0:
        store = serve_on(listen("127.0.0.1", 0, several_hosts=False))
        connection.send(store.port)
        return store
    return tcp_store("127.0.0.1", connection.recv())


def _receive(connection: Connection) -> bytes | None:
    try:
        return connection.recv_bytes()
    except (EOFError, ConnectionResetError):
        return None


def _answer(request: bytes, rank: int, connection: Connection, store: Store, device: torch.device) -> None:
    answered = False
    try:
        call: Request = pickle.loads(request)
        with warnings.catch_warnings(), _world(call, rank, store, device) as world:
            warnings.filters = call.filters  # those of the caller: pytest's "error" holds here too
            connection.send_bytes(pickle.dumps((True, call.fn(world, *call.args))))
            answered = True
            # Stay until all ranks are done: to one that still waits for us, leaving would look like a crash.
            _receive(connection)
    except BaseException as error:
        if answered:
            raise
        connection.send_bytes(pickle.dumps((False, Failure.of(rank, error))))


def _world(call: Request, rank: int, store: Store, device: torch.device) -> AbstractContextManager[World]:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(call.size), LOCAL_RANK=str(rank))
    mine = PrefixStore(f"call{call.number}", store)
    patience = timedelta(seconds=call.timeout + 60)  # the pool's own time ends first, and shows the stacks
    mine.set_timeout(patience)
    return default_group(
        rank,
        call.size,
        mine,
        device=device,
        timeout=patience,
        local_rank=rank,
        local_size=call.size,
        source="stretto.testing.Pool",
    )
