"""Reasons to end a run early, gathered in a flag that the training loop asks; pure, and without torch."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Final, Self

from stretto.terminal import say

REQUEUE: Final = 75
"""Exit code that asks to be started again to go on: EX_TEMPFAIL of <sysexits.h>, "the user is invited to retry"."""


class Stopped(SystemExit):
    """A signal that came before there was anything to save. The process ends with exit code `REQUEUE`.

    Not with 0, whatever the signal: nothing was done, and a launcher should end the other ranks, too.
    """

    def __init__(self, number: int) -> None:
        super().__init__(REQUEUE)
        self.number = number

    def say(self, rank: int) -> int:
        """On rank 0, tell the user; the exit code."""
        if rank == 0:
            say(
                f"stopped by {signal.Signals(self.number).name} before the first step: nothing was done, nothing is "
                f"saved; exit code {REQUEUE} asks to be started again"
            )
        return REQUEUE


class StopFlag:
    """Within, signals and a time limit no longer end the process: they raise this flag, which is called to ask.

        with StopFlag(after=3.5 * 3600) as stop:
            while not stop(): ...
        return stop.exit_code

    SIGINT and SIGTERM mean: save and leave (exit code 0). SIGUSR1, which SLURM sends before the time is up, and the
    limit `after` (seconds since the flag was made) mean: save, leave, and start again (exit code `REQUEUE`). A second
    SIGINT raises KeyboardInterrupt, unless `impatient` is false: some launchers send one Ctrl-C twice. Ranks may see
    different signals: the loop must agree on when to stop, and all on whether one was `ordered` to leave.

    With `starting`, and until `started` is called, nobody asks yet: then SIGTERM and SIGUSR1 raise `Stopped`, and
    SIGINT KeyboardInterrupt.
    """

    def __init__(
        self,
        *,
        after: float | None = None,
        impatient: bool = True,
        starting: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit = after
        """Seconds from the making of the flag to its rising by itself; None: never."""
        self._impatient = impatient
        self._starting = starting
        self._clock = clock
        self._began = clock()
        self._signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self._before = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def started(self) -> None:
        """From now on somebody asks: signals raise the flag and nothing else."""
        self._starting = False

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT == self._signal and self._impatient:
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
        return self._signal in (signal.SIGINT, signal.SIGTERM)

    @property
    def exit_code(self) -> int:
        """What the process should return when it has stopped: 0, or `REQUEUE`."""
        return REQUEUE if self() and not self.ordered else 0
