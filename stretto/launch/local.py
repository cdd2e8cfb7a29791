"""Run a function as N ranks on this machine, by forking: torch is imported once, not N times.

Workers see the variables that torchrun sets, so there is one path into a world. Each is in a process group of
its own: Ctrl-C reaches this process alone, and is passed on once.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType

from stretto.initialize.environment import detect
from stretto.initialize.stop import REQUEUE, Interrupts, heard
from stretto.initialize.stores import serve_on
from stretto.launch.worker import PASSED_ON, Worker, fork
from stretto.terminal import say

POLL_SECONDS = 0.02

# Parts of `grace` after the first failure: most ranks end by themselves, as their collectives break.
TERM_AT, KILL_AT = 0.25, 0.6


def run_local(
    nproc: int,
    target: Callable[[], int],
    *,
    grace: float = 15.0,
    within: AbstractContextManager[object] | None = None,
) -> int:
    """Run `target` in `nproc` forked workers; 0 when all return 0, else the exit code of the first cause.

    The signals of `PASSED_ON` are passed on, for the workers to end in agreement; a second SIGINT, a second or more
    after the first, kills them, and the exit code is 130. Each worker enters `within`, such as a `StopFlag`, before a
    first signal can reach it.
    When a worker fails, all others have ended within `grace` seconds, and its traceback is printed last.

    Under a launcher (torchrun, srun, mpirun) this process is a rank already: `target` runs in it, as one of however
    many the launcher has started. `LaunchError` where its variables contradict each other.

    Call it before torch has computed anything in this process, and from its main thread.
    """
    if detect(os.environ).source != "python":  # a job for each rank would share one output
        with within or nullcontext():
            return target()
    if nproc < 1:
        raise ValueError(f"nproc={nproc}: at least one worker")
    listener = socket.create_server(("127.0.0.1", 0), backlog=max(nproc, 128))
    environment = _environment(nproc, listener.getsockname()[1])
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until someone is there to take them
    try:
        workers = [fork(rank, environment, listener, target, within or nullcontext()) for rank in range(nproc)]
        store = serve_on(listener)
        with _passing_on(workers) as insisted:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
            _wait(workers, grace)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    del store  # it served until the last worker had ended
    code = _conclude(workers)
    # That we killed them is how it came about; that the user insisted is why.
    return 128 + signal.SIGINT if insisted() and code == 128 + signal.SIGKILL else code


def _environment(nproc: int, port: int) -> dict[str, str]:
    """What all workers share of torchrun's variables: this process serves the store, as its agent does."""
    return {
        "STRETTO_LAUNCHER": "stretto",
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


@contextmanager
def _passing_on(workers: list[Worker]) -> Iterator[Callable[[], bool]]:
    """Within, signals go to the workers; yields what says whether a second SIGINT came."""
    interrupts = Interrupts()

    def pass_on(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and not interrupts():
            return
        for worker in workers:
            worker.send(signal.SIGKILL if interrupts.count > 1 else number)

    before = {number: signal.signal(number, pass_on) for number in heard()}
    try:
        yield lambda: interrupts.count > 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(workers: list[Worker], grace: float) -> None:
    """Until all have ended; after a first failure the others are made to."""
    running = list(workers)
    failed_at: float | None = None
    halted_at: float | None = None
    steps = [(TERM_AT * grace, signal.SIGTERM), (KILL_AT * grace, signal.SIGKILL)]
    while running:
        for worker in list(running):
            if worker.take_end(len(workers) - len(running)):
                running.remove(worker)
                if worker.code not in (0, REQUEUE) and failed_at is None:
                    failed_at = time.monotonic()
        if failed_at is not None and steps and time.monotonic() > failed_at + steps[0][0]:
            number = steps.pop(0)[1]
            untold = number == signal.SIGKILL and all(worker.failure is None for worker in workers)
            for worker in running:
                worker.halted |= untold and worker.at_a_halt  # what the others could not say
                worker.send(number)
        # Nobody who waits for these is left to say so.
        halted = len(running) < len(workers) and failed_at is None and all(worker.at_a_halt for worker in running)
        halted_at = (halted_at or time.monotonic()) if running and halted else None
        if halted_at is not None and time.monotonic() > halted_at + grace:
            for worker in running:
                worker.halted = True
                worker.send(signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def _conclude(workers: list[Worker]) -> int:
    """Say what happened, the cause last; the exit code of the whole."""
    failed = sorted((w for w in workers if w.code), key=Worker.severity)
    if not failed:
        return 0
    cause = failed[0]
    # All may have the code of a rank that was killed: its launcher has killed the others.
    told = cause.failure is not None or cause.killed or len({w.code for w in workers}) > 1
    if told and not all(w.stopped and not w.halted for w in failed):
        endings: dict[str, list[str]] = {}
        for worker in sorted(failed[1:], key=lambda w: w.rank):
            endings.setdefault(worker.ending(), []).append(str(worker.rank))
        for ending, ranks in endings.items():
            say(f"rank {', '.join(ranks)}: {ending}")
        tables = [w.failure for w in failed[1:] if w.failure is not None and w.failure.finding]
        for failure in [t for t in tables if not t.silent and not t.consequence][
            :1
        ]:  # the check's, which shows where each rank was
            say(f"\n{failure.text}", end="")
        say(f"\n{_cause(cause, failed, len(workers))}", end="")
    # What others saw of a rank that was killed explains more, but the exit code is that rank's.
    code = next((w.code for w in failed if w.killed), cause.code) or 0
    return 128 - code if code < 0 else code


def _cause(cause: Worker, failed: list[Worker], size: int) -> str:
    """The first cause, in words; of a rank that could say nothing itself, with what the others were doing."""
    told = cause.failure
    if told is not None and not cause.killed and not cause.halted:
        return told.text if told.silent else f"Rank {told.rank} of {size} failed:\n{told.text}"
    phases = Counter(w.failure.phase for w in failed if w.failure is not None and w.failure.phase)
    where = f", while the others were {phases.most_common(1)[0][0]}" if phases else ""
    return f"Rank {cause.rank} of {size} {cause.ending()}{where}\n"
