"""Reasons to end a run early, gathered in a flag that the training loop asks; pure, and without torch."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final, Self

from stretto.terminal import say

REQUEUE: Final = 75
"""Exit code that asks to be started again to go on: EX_TEMPFAIL of <sysexits.h>, "the user is invited to retry"."""

LEAVE: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Orders to leave for good: a key, a launcher, a terminal that closes. What was started by `nohup` ignores the last."""

HEARD: Final = (*LEAVE, signal.SIGUSR1)
"""All signals that stop a run in good order."""

MARK: Final = "STRETTO_REQUEUE"
"""Variable that names a file. Where it is set, a run that asks to be started again leaves this file and ends with 0.

For launchers that end all ranks as soon as one has an exit code other than 0, as srun does: an exit code of 75 would
have the last ranks killed on their way out, and the job would have failed.
"""


def heard() -> tuple[signal.Signals, ...]:
    """`HEARD`, without a hang-up that this process was started to ignore."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in HEARD if not (ignored and number == signal.SIGHUP))


def ask_again(*, leave_mark: bool) -> tuple[int, str]:
    """The exit code of a run that is to be started again, and what asks for that, in words.

    All ranks call it, and one is to `leave_mark`, once all that the next start needs is saved.
    """
    mark = os.environ.get(MARK)
    if not mark:
        return REQUEUE, f"exit code {REQUEUE}"
    if leave_mark:
        try:
            Path(mark).touch()
        except OSError as error:
            say(f"{MARK}={mark} cannot be written: {error}")
            return REQUEUE, f"exit code {REQUEUE}"
    return 0, mark


class Stopped(SystemExit):
    """A signal that came before there was anything to save. The process ends with exit code `REQUEUE`.

    Not with 0, whatever the signal: nothing was done, and a launcher should end the other ranks, too. That end is a
    SIGTERM, so only the warning leaves the mark of a run that is to be started again.
    """

    def __init__(self, number: int) -> None:
        super().__init__(REQUEUE)
        self.number = number

    def say(self, rank: int) -> int:
        """On rank 0, tell the user; the exit code."""
        _, how = ask_again(leave_mark=True) if self.number == signal.SIGUSR1 else (REQUEUE, f"exit code {REQUEUE}")
        if rank == 0:
            say(
                f"stopped by {signal.Signals(self.number).name} before the first step: nothing was done, nothing is "
                f"saved; {how} asks to be started again"
            )
        return REQUEUE


@contextmanager
def warning_kept_from_children() -> Iterator[None]:
    """Within, what is started never sees SIGUSR1, and nor do threads that begin; this process hears it at the end.

    SLURM warns all processes of a step, not the ranks alone: compilers, and the workers in which `torch.compile` runs
    them, would end by it, and the first step of a run with them. A blocked signal stays blocked in children, where a
    handler does not.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Interrupts:
    """Counts how often the user pressed Ctrl-C: called at each SIGINT, says whether it is another one.

    One may arrive twice: from the terminal and from a launcher that passes it on, or from a key that bounces.
    """

    ONE = 1.0
    """Seconds within which several are one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = -self.ONE + clock()
        self.count = 0

    def __call__(self) -> bool:
        now = self._clock()
        another = now - self._last >= self.ONE
        if another:
            self._last, self.count = now, self.count + 1
        return another


class StopFlag:
    """Within, signals and a time limit no longer end the process: they raise this flag, which is called to ask.

        with StopFlag(after=3.5 * 3600) as stop:
            while not stop(): ...
        return stop.exit_code

    SIGINT, SIGTERM and SIGHUP, unless that is ignored, mean: save and leave (exit code 0). SIGUSR1, which SLURM sends
    before the time is up, and the limit `after` (seconds since the flag was made) mean: save, leave, and start again
    (exit code `REQUEUE`). A second SIGINT raises KeyboardInterrupt; within a second it is the first one once more.
    Ranks may see different signals: the loop must agree on when to stop, and all on whether one was `ordered` to leave.

    With `starting`, and until `started` is called, nobody asks yet: then SIGINT raises KeyboardInterrupt, and the
    others `Stopped`.
    """

    def __init__(
        self,
        *,
        after: float | None = None,
        starting: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit = after
        """Seconds from the making of the flag to its rising by itself; None: never."""
        self._starting = starting
        self._clock = clock
        self._began = clock()
        self._signal: int | None = None
        self._interrupts = Interrupts(clock)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in heard()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def started(self) -> None:
        """From now on somebody asks: signals raise the flag and nothing else."""
        self._starting = False

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupts() and self._interrupts.count > 1:
            raise KeyboardInterrupt
        first = self._signal is None
        if self._signal in (None, signal.SIGUSR1):  # a warning gives way to an order
            self._signal = number
        if self._starting and first:  # once: what follows would only disturb the way out
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)

    def __call__(self) -> bool:
        """Whether this process wants the run to end."""
        return self._signal is not None or self._late

    @property
    def _late(self) -> bool:
        return self.limit is not None and self._clock() - self._began >= self.limit

    @property
    def reason(self) -> str:
        """Why, in words; empty when the flag is down."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        return f"the time limit of {self.limit:g} s" if self._late else ""

    @property
    def ordered(self) -> bool:
        """Whether somebody told this process to leave for good, which outweighs any warning."""
        return self._signal in LEAVE

    @property
    def exit_code(self) -> int:
        """What the process should return when it has stopped: 0, or `REQUEUE`."""
        return REQUEUE if self() and not self.ordered else 0
