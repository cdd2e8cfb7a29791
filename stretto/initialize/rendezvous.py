"""The ranks find each other over a key-value store, and check that they mean the same job.

Waiting ends in time and with one message that says who is missing, in place of a hang in the first collective.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

from torch.distributed import DistError
from torch.distributed.distributed_c10d import PrefixStore, Store

from stretto.initialize.environment import Launch
from stretto.initialize.roll_call import Server
from stretto.initialize.stores import address_of, listen, serve_on, tcp_store
from stretto.initialize.torchrun import record
from stretto.layout.ranks import ranges
from stretto.store import StoreLostError, TimedStore, absent, combine, in_time, read_json, until

GRACE_SECONDS = 5.0
"""How much longer the others wait than rank 0, who knows who is missing; how long rank 0 waits for goodbyes."""

ALL_THERE = "all are there"

Meeting = tuple[Store, Server]
"""The store that all ranks of the job share, and who serves it."""


class RendezvousError(RuntimeError):
    """The ranks of the job did not find each other, or disagree about the job."""


class RankZeroError(RendezvousError):
    """Rank 0 is not heard, so no rank speaks for all."""


@dataclass(frozen=True)
class Hello:
    """What each rank says of itself when it arrives."""

    rank: int
    size: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"host {self.host} pid {self.pid}"

    @classmethod
    def read(cls, value: bytes) -> Hello:
        """What a rank wrote. RendezvousError for anything else: whoever reaches the store may write to it."""
        try:
            said = read_json(value)
            rank, size, pid = (int(said[name]) for name in ("rank", "size", "pid"))
            return cls(rank, size, re.sub(r"[^\w.:-]", "?", str(said["host"])[:256]), pid)
        except (ValueError, TypeError, KeyError):
            raise RendezvousError(
                "the rendezvous store has a greeting that no rank of this job writes: another program uses it"
            ) from None


@contextmanager
def rendezvous(launch: Launch, *, timeout: float) -> Iterator[Meeting]:
    """Yield the store that all ranks of the job share, once all are there and agree, and who serves it.

    Raises `RendezvousError`, on every rank that can be reached, within `timeout` seconds and a few more.
    """
    try:
        with _met(launch, timeout) as found:
            yield found
    except RendezvousError as error:
        record(launch.rank, error, message=True)
        raise


@contextmanager
def _met(launch: Launch, timeout: float) -> Iterator[Meeting]:
    deadline = time.monotonic() + timeout
    addr, server_of_store = launch.master_addr, None
    if launch.rank == 0 and not launch.agent_store:
        addr, server_of_store = _serve(launch)
    job = PrefixStore(f"stretto/{launch.attempt}", _join(launch, addr, deadline, timeout))
    try:
        # How often it was here before, and left: old keys are not for us.
        visit = TimedStore(job).add(f"visits/{launch.rank}", 0)
        here = PrefixStore(str(visit), job)
        server = check_in(TimedStore(here), launch, deadline, timeout)
    except (DistError, StoreLostError) as error:
        why = str(error).partition("\n")[0]
        raise RankZeroError(
            f"rank {launch.rank}: the store of rank 0, at {addr}, went away while ranks met: {why}"
        ) from None
    yield here, server
    with suppress(DistError, StoreLostError):  # the server may have left before us: then there is nothing to tell it
        goodbye(TimedStore(job), launch.rank, launch.size, visit, serves=server_of_store is not None)


def from_rank_0(met: Meeting, launch: Launch, name: str, look: Callable[[], str], *, timeout: float) -> str:
    """What `look` gives on rank 0, on all ranks: one process asks the file system, not all of them.

    Raises RankZeroError when rank 0 has said nothing after `timeout` seconds.
    """
    store = TimedStore(met[0])
    if launch.rank == 0:
        store.set(name, said := look())
        return said
    if not store.wait(name, timeout + GRACE_SECONDS):
        problem = f"rank {launch.rank}: rank 0, on {met[1]}, did not say within {timeout:g} s what it found: {name}"
        raise RankZeroError(problem)
    return store.get(name).decode(errors="replace")


def goodbye(store: TimedStore, rank: int, size: int, visit: int, *, serves: bool) -> None:
    """Leave in good order; who serves the store waits a moment for the others to do so."""
    store.add(f"visits/{rank}", 1)
    if combine(store.under(f"goodbyes/{visit}"), rank, size, "") is not None:
        store.set(f"goodbye/{visit}", "")
    elif serves:
        store.poll(f"goodbye/{visit}", GRACE_SECONDS)


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

    if not until(answers, deadline):
        if isinstance(failure, socket.gaierror):
            raise RankZeroError(
                f"rank {launch.rank}: the name MASTER_ADDR={addr} did not resolve within {timeout:g} s "
                f"({failure.strerror}). It must be the host of rank 0, by a name or address that all hosts know"
            )
        raise RankZeroError(
            f"rank {launch.rank}: nothing answered at MASTER_ADDR={addr} MASTER_PORT={port} within {timeout:g} s "
            f"({failure}). Is rank 0 running, on that host, and may this host connect to that port?"
        )
    if store := _client(addr, port, max(1.0, deadline - time.monotonic())):
        return store
    raise RankZeroError(
        f"rank {launch.rank}: what listens at MASTER_ADDR={addr} MASTER_PORT={port} does not speak as a rendezvous "
        "store. Another program may have that port: choose another one with MASTER_PORT"
    )


def _connect(addr: str, port: int, deadline: float) -> None:
    """Raise OSError unless one of the addresses of `addr` accepts a connection now."""

    def left() -> float:
        return max(0.1, deadline - time.monotonic())

    try:
        found = in_time(lambda: socket.getaddrinfo(addr, port, type=socket.SOCK_STREAM), left())
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
        return in_time(lambda: tcp_store(addr, port, timeout=seconds), seconds + 1)
    except (DistError, TimeoutError):
        return None


def check_in(store: TimedStore, launch: Launch, deadline: float, timeout: float) -> Server:
    """Say hello; who comes last, or finds a contradiction, tells all. A rank sends and reads a few small values.

    Rank 0 looks at the time, and says who is missing. Returns who serves the store.
    """
    me = Hello(launch.rank, launch.size, socket.gethostname(), os.getpid())
    store.add("arrivals", 1)
    first = store.add(f"came/{launch.rank}", 1) == 1
    if first:
        store.set(f"hello/{launch.rank}", json.dumps(asdict(me)))

    def late() -> RankZeroError:
        return RankZeroError(
            f"rank {launch.rank} of {launch.size}: rank 0 did not arrive within {timeout:g} s; "
            f"{store.add('arrivals', 0)} ranks did"
        )

    if not store.wait("hello/0", deadline + GRACE_SECONDS - time.monotonic()):
        raise late()
    zero = Hello.read(store.get("hello/0"))
    mine = _contradiction(store, me, zero, first)
    if mine:
        store.compare_set("verdict", "", mine)
    elif combine(store.under("check-in"), launch.rank, launch.size, "") is not None:
        store.compare_set("verdict", "", ALL_THERE)
    if launch.rank == 0 and not store.poll("verdict", deadline - time.monotonic()):
        store.compare_set("verdict", "", _missing(store, launch.size, timeout))
    if not store.wait("verdict", deadline + GRACE_SECONDS - time.monotonic()):
        raise late()
    verdict = store.get("verdict").decode(errors="replace")
    store.add("heard", 1)
    problem = mine if mine and verdict == ALL_THERE else verdict
    if problem != ALL_THERE:
        if launch.rank == 0:  # our end may end the store: let the others hear first, also those still on their way
            coming = launch.size if time.monotonic() < deadline else 0
            until(
                lambda: store.add("heard", 0) >= max(store.add("arrivals", 0), coming),
                time.monotonic() + GRACE_SECONDS,
            )
        raise RendezvousError(problem)
    return Server(launch.master_addr) if launch.agent_store else Server(zero.host, zero.pid)


def _contradiction(store: TimedStore, me: Hello, zero: Hello, first: bool) -> str:
    """What is wrong with this rank, empty when nothing is."""
    if me.size != zero.size:
        return f"rank {me.rank} ({me}) was told of {me.size} ranks in all, but rank 0 of {zero.size}"
    if first:
        return ""
    if store.check(["verdict"]) and store.get("verdict").decode(errors="replace") == ALL_THERE:
        return f"{me} came as rank {me.rank} when all {me.size} ranks were there already"
    store.wait(f"hello/{me.rank}", GRACE_SECONDS)
    other = Hello.read(store.get(f"hello/{me.rank}"))
    return f"two processes came as rank {me.rank}: {other} and {me}. Each needs its own RANK"


def _missing(store: TimedStore, size: int, timeout: float) -> str:
    """Who has not arrived, and where the others are."""
    missing = absent(store.under("check-in"), size)
    gone = set(missing)
    there = [Hello.read(said) for said in store.multi_get([f"hello/{r}" for r in range(size) if r not in gone])]
    hosts = Counter(h.host for h in there)
    where = ", ".join(f"{n} on {host}" for host, n in sorted(hosts.items())[:64])
    more = f", .. ({len(hosts)} hosts in all)" if len(hosts) > 64 else ""
    return (
        f"{len(there)} of {size} ranks arrived within {timeout:g} s; missing: {ranges(missing)}. Arrived: {where}{more}"
    )
