"""The ranks find each other over a key-value store, and check that they mean the same job.

Waiting ends in time and with one message that says who is missing, in place of a hang in the first collective.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from queue import Empty, Queue
from threading import Thread
from typing import TypeVar

from torch.distributed import DistError
from torch.distributed.distributed_c10d import PrefixStore, Store

from stretto.initialize.environment import Launch
from stretto.initialize.stores import address_of, listen, serve_on, tcp_store

GRACE_SECONDS = 5.0
"""How much longer the others wait than rank 0, who knows who is missing; how long rank 0 waits for goodbyes."""


T = TypeVar("T")


class RendezvousError(RuntimeError):
    """The ranks of the job did not find each other, or disagree about the job."""


@dataclass(frozen=True)
class Hello:
    """What each rank says of itself when it arrives."""

    rank: int
    size: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"host {self.host} pid {self.pid}"


@contextmanager
def meet(launch: Launch, *, timeout: float) -> Iterator[Store]:
    """Yield the store that all ranks of the job share, once all are there and agree.

    Raises `RendezvousError`, on every rank that can be reached, within `timeout` seconds and a few more.
    """
    deadline = time.monotonic() + timeout
    addr, server = launch.master_addr, None
    if launch.rank == 0 and not launch.agent_store:
        addr, server = _serve(launch)
    job = PrefixStore(f"stretto/{launch.attempt}", _join(launch, addr, deadline, timeout))
    visit = _visit(job, launch.rank)
    here = PrefixStore(str(visit), job)
    try:
        _check_in(here, launch, deadline, timeout)
    except DistError as error:
        raise RendezvousError(f"rank {launch.rank}: the store of rank 0 went away while ranks met: {error}") from None
    yield here
    with suppress(DistError):  # the server may have left before us: then there is nothing to tell it
        job.set(f"left/{launch.rank}/{visit}", "")
        job.add("goodbyes", 1)
        if server:
            _until(lambda: job.add("goodbyes", 0) >= launch.size, time.monotonic() + GRACE_SECONDS)


def _serve(launch: Launch) -> tuple[str, Store]:
    """The server, and the address that it listens at."""
    try:
        listener = listen(launch.master_addr, launch.master_port, several_hosts=launch.local_size < launch.size)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise RendezvousError(
            f"rank 0 cannot serve the rendezvous: port {launch.master_port} of {socket.gethostname()} is in use by "
            "another process. Choose another one with MASTER_PORT (torchrun: --master-port), or end that process"
        ) from None
    addr = address_of(listener)
    return addr, serve_on(listener)


def _join(launch: Launch, addr: str, deadline: float, timeout: float) -> Store:
    """Connect to the server, which may come up later than we do, as may its name."""
    port = launch.master_port
    failure = OSError("not tried")

    def answers() -> bool:
        nonlocal failure
        try:
            _connect(addr, port, deadline)
        except OSError as error:
            failure = error
            return False
        return True

    if not _until(answers, deadline):
        if isinstance(failure, socket.gaierror):
            raise RendezvousError(
                f"rank {launch.rank}: the name MASTER_ADDR={addr} did not resolve within {timeout:g} s "
                f"({failure.strerror}). It must be the host of rank 0, by a name or address that all hosts know"
            )
        raise RendezvousError(
            f"rank {launch.rank}: nothing answered at MASTER_ADDR={addr} MASTER_PORT={port} within {timeout:g} s "
            f"({failure}). Is rank 0 running, on that host, and may this host connect to that port?"
        )
    if store := _client(addr, port, max(1.0, deadline - time.monotonic())):
        return store
    raise RendezvousError(
        f"rank {launch.rank}: what listens at MASTER_ADDR={addr} MASTER_PORT={port} does not speak as a rendezvous "
        "store. Another program may have that port: choose another one with MASTER_PORT"
    )


def _connect(addr: str, port: int, deadline: float) -> None:
    """Raise OSError unless one of the addresses of `addr` accepts a connection now."""

    def left() -> float:
        return max(0.1, deadline - time.monotonic())

    try:
        found = _in_time(lambda: socket.getaddrinfo(addr, port, type=socket.SOCK_STREAM), left())
    except TimeoutError:
        raise socket.gaierror(socket.EAI_AGAIN, "the name service does not answer") from None
    failure = OSError("it has no address")
    for family, kind, protocol, _, where in found:
        try:
            with socket.socket(family, kind, protocol) as tried:
                tried.settimeout(left())
                tried.connect(where)
        except OSError as error:
            failure = error
        else:
            return
    raise failure


def _client(addr: str, port: int, seconds: float) -> Store | None:
    """A client of the store; None when what listens there is no store: it may accept, and say nothing."""
    try:
        return _in_time(lambda: tcp_store(addr, port, timeout=seconds), seconds + 1)
    except (DistError, TimeoutError):
        return None


def _in_time(call: Callable[[], T], seconds: float) -> T:
    """What a call returns or raises that may take longer than we have; TimeoutError when it does.

    A name service that is down has time-outs of its own, and a client of the store has none. So a thread waits for it.
    """
    answer: Queue[tuple[T | None, Exception | None]] = Queue()

    def ask() -> None:
        try:
            answer.put((call(), None))
        except Exception as error:  # noqa: BLE001  # it is raised where it is waited for
            answer.put((None, error))

    Thread(target=ask, daemon=True).start()
    try:
        result, error = answer.get(timeout=seconds)
    except Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # the call has returned it


def _visit(job: Store, rank: int) -> int:
    """How often this rank has met the others on this store before, and left: old keys are not for us."""
    visit = 0
    while job.check([f"left/{rank}/{visit}"]):
        visit += 1
    return visit


def _check_in(store: Store, launch: Launch, deadline: float, timeout: float) -> None:
    """Say hello; rank 0 waits for all and judges; everyone learns the verdict."""
    me = Hello(launch.rank, launch.size, socket.gethostname(), os.getpid())
    index = store.add("arrivals", 1) - 1
    store.set(f"hello/{index}", json.dumps(asdict(me)))
    if launch.rank == 0:
        store.set("verdict", json.dumps([launch.size, _judge(store, launch.size, deadline, timeout)]))
    if not _until(lambda: store.check(["verdict"]), deadline + GRACE_SECONDS):
        raise RendezvousError(
            f"rank {launch.rank} of {launch.size}: rank 0 did not arrive within {timeout:g} s; "
            f"{store.add('arrivals', 0)} ranks did"
        )
    size, problem = json.loads(store.get("verdict"))
    store.add("heard", 1)
    if size != launch.size:
        problem = f"rank {launch.rank} was told of {launch.size} ranks in all, but rank 0 of {size}"
    elif not problem and index >= size:
        problem = f"{me} came as rank {launch.rank} when all {size} ranks were there already"
    if problem:
        if launch.rank == 0:  # our end may end the store: let the others hear first, also those still on their way
            coming = launch.size if time.monotonic() < deadline else 0
            _until(
                lambda: store.add("heard", 0) >= max(store.add("arrivals", 0), coming),
                time.monotonic() + GRACE_SECONDS,
            )
        raise RendezvousError(problem)


def _judge(store: Store, size: int, deadline: float, timeout: float) -> str:
    """What is wrong with those that arrived, empty when nothing is; as soon as it can be known."""
    hellos: list[Hello] = []

    def decided() -> bool:
        arrived = store.add("arrivals", 0)
        hellos.extend(Hello(**json.loads(store.get(f"hello/{i}"))) for i in range(len(hellos), arrived))
        return arrived >= size or bool(disagreement(hellos, size))

    _until(decided, deadline)
    if problem := disagreement(hellos, size):
        return problem
    missing = sorted(set(range(size)) - {h.rank for h in hellos})
    hosts = Counter(h.host for h in hellos)
    return (
        f"{len(hellos)} of {size} ranks arrived within {timeout:g} s; missing: {_ranges(missing)}. Arrived: "
        + ", ".join(f"{n} on {host}" for host, n in sorted(hosts.items()))
        if missing
        else ""
    )


def disagreement(hellos: list[Hello], size: int) -> str:
    """The first contradiction among those that arrived, or an empty string."""
    seen: dict[int, Hello] = {}
    for hello in hellos:
        if hello.size != size:
            return f"rank {hello.rank} ({hello}) was told of {hello.size} ranks in all, but rank 0 of {size}"
        if other := seen.get(hello.rank):
            return f"two processes came as rank {hello.rank}: {other} and {hello}. Each needs its own RANK"
        seen[hello.rank] = hello
    return ""


def _ranges(ranks: list[int]) -> str:
    """Ranks in a row as one: [0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in runs)


def _until(done: Callable[[], bool], deadline: float) -> bool:
    """Poll, at first quickly, then sparingly, as rank 0 answers thousands; whether it was done in time."""
    pause = 0.01
    while not done():
        if (left := deadline - time.monotonic()) <= 0:
            return False
        time.sleep(min(pause, left))
        pause = min(pause * 1.5, 0.5)
    return True
