"""`Pool`: processes that run one function as the ranks of a world, again and again.

    with Pool(size=8) as pool:
        sums = pool.run(4, total, torch.ones(3))       # total(world, x) on ranks 0..3, results in rank order

Starting eight torch processes costs seconds; a pool pays that once, by forking.
"""

from __future__ import annotations

import pickle
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self

from stretto.initialize.failures import Failure
from stretto.testing.forkserver import ForkServer
from stretto.testing.worker import Request, serve, stack_file

GRACE_SECONDS = 0.5
"""After a first failure: how long others may still show that they are its cause, or finish."""

START_SECONDS = 60.0
"""How long workers may take to find each other."""


class RemoteError(Exception):
    """The cause of an exception that `Pool.run` raises: where it happened, on which rank."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class WorkerDiedError(RuntimeError):
    """A worker ended in the middle of a call."""


class WorkersStuckError(TimeoutError):
    """A call was not finished in its time; the message has the stacks of the ranks that were stuck."""


class Pool:
    """Workers that wait for functions to run as ranks of a world.

    Make it early: it forks this process, once, at construction, so functions should be importable by then and
    torch should not have computed anything yet. The workers start at the first `run`. After a failure or a
    time-out they are replaced, so one test cannot disturb the next.
    """

    def __init__(self, size: int = 8, *, device: str = "cpu") -> None:
        """`size` workers at most; `device="cuda"` gives rank i the GPU i and NCCL beside Gloo."""
        self.size = size
        self.device = device
        self._directory = Path(tempfile.mkdtemp(prefix="stretto-pool-"))
        self._server = ForkServer(partial(serve, directory=self._directory, device=device))
        self._workers: list[Connection] = []
        self._calls = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers."""
        self._forget_workers()
        self._server.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def run(self, n: int, fn: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """Run `fn(world, *args)` on ranks 0..n-1 in a fresh default process group; results in rank order.

        `fn` is a function of a module; it, `args` and results travel by pickle. The caller's warning filters
        hold in the workers.

        Raises what the first failing rank raised, caused by a `RemoteError`; `WorkerDiedError` when a worker
        ended; `WorkersStuckError` after `timeout` seconds.
        """
        if not 1 <= n <= self.size:
            raise ValueError(f"n={n} ranks asked of a pool of {self.size}: 1 <= n <= {self.size}")
        filters = list(warnings.filters)
        request = pickle.dumps(Request(self._calls, n, timeout, filters, fn, args))
        try:
            workers = self._start()[:n]
            self._calls += 1
            for worker in workers:
                worker.send_bytes(request)
            results = self._collect(workers, time.monotonic() + timeout, timeout)
            for worker in workers:
                worker.send_bytes(b"")  # all are done: leave the group
            return results
        except BaseException:
            self._forget_workers()
            self._server.kill()
            raise

    def _start(self) -> list[Connection]:
        """The workers; forked when there are none."""
        if not self._workers:
            self._workers = self._server.start(self.size)
            if not self._workers[0].poll(START_SECONDS):
                raise WorkersStuckError(f"rank 0 of the pool took more than {START_SECONDS:.0f} s to start")
            port = self._workers[0].recv()
            for worker in self._workers[1:]:
                worker.send(port)
        return self._workers

    def _forget_workers(self) -> None:
        for worker in self._workers:
            worker.close()
        self._workers = []

    def _collect(self, workers: list[Connection], deadline: float, timeout: float) -> list[Any]:
        """Answers of all ranks, or the most telling failure, soon after the first one."""
        rank_of = {worker: rank for rank, worker in enumerate(workers)}
        results: dict[int, Any] = {}
        failures: dict[int, Failure | None] = {}  # None: the worker ended; in order of arrival
        waiting = set(workers)
        while waiting:
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for worker in ready:
                assert isinstance(worker, Connection)
                waiting.remove(worker)
                self._take(worker, rank_of[worker], results, failures)
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if failures:
            raise self._cause(failures)
        if waiting:
            raise self._hung(sorted(rank_of[w] for w in waiting), len(workers), timeout)
        return [results[rank] for rank in range(len(workers))]

    @staticmethod
    def _take(worker: Connection, rank: int, results: dict[int, Any], failures: dict[int, Failure | None]) -> None:
        try:
            good, value = pickle.loads(worker.recv_bytes())
        except (EOFError, ConnectionResetError):
            failures[rank] = None
            return
        if good:
            results[rank] = value
        else:
            failures[rank] = value

    def _cause(self, failures: dict[int, Failure | None]) -> BaseException:
        """The failure to show: a death first, then an exception, then what follows from another's failure."""

        def severity(rank: int) -> int:
            failure = failures[rank]
            return 0 if failure is None else 1 + failure.consequence

        rank = min(failures, key=severity)  # the first to arrive among equals
        failure = failures[rank]
        if failure is None:
            code = self._server.kill()[rank]
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            return WorkerDiedError(f"rank {rank} ended {how} in the middle of a call{self._stacks(rank)}")
        where = RemoteError(f"On rank {rank}:\n{failure.text}")
        error = pickle.loads(failure.pickled) if failure.pickled else RuntimeError(failure.text)
        assert isinstance(error, BaseException)
        error.__cause__ = where
        return error

    def _hung(self, stuck: list[int], n: int, timeout: float) -> WorkersStuckError:
        self._server.signal(stuck, signal.SIGABRT)  # faulthandler writes the stacks, then the process ends
        for rank in stuck:
            wait([self._workers[rank]], 2.0)
        stacks = "".join(self._stacks(rank) for rank in stuck)
        return WorkersStuckError(f"{len(stuck)} of {n} ranks not done after {timeout:g} s: {stuck}{stacks}")

    def _stacks(self, rank: int) -> str:
        text = stack_file(self._directory, rank).read_text().strip()
        return f"\n\nStacks of rank {rank}:\n{text}" if text else ""
