"""Live progress of a run: a bar and figures on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from stretto.train.record import EvalRecord, StepRecord


class LiveProgress:
    """Step, loss, gradient norm, learning rate, tokens/s and time left, after each step.

    On a terminal they stand in two lines that are kept up to date; elsewhere each `log_every`-th step has a line.
    """

    def __init__(self, console: Console, *, steps: int, after: int, log_every: int) -> None:
        self.console, self.steps, self.log_every = console, steps, log_every
        self._begin, self._after = time.monotonic(), after
        self._live = Live(self._drawn(after, "", "starting"), console=console, refresh_per_second=4)
        if console.is_terminal:
            self._live.start()

    def stepped(self, record: StepRecord) -> None:
        left = f"{self._left(record.step)} left"
        loss, norm = f"{record.loss:.4f}", f"{record.grad_norm:.3f}"
        lr, rate = f"{record.lr:.2e}", f"{record.tokens_per_second:,.0f}"
        if self.console.is_terminal:
            figures = f"loss [bold cyan]{loss}[/]   norm {norm}   lr {lr}   [green]{rate}[/] tokens/s"
            self._live.update(self._drawn(record.step, left, figures))
        elif record.step % self.log_every == 0 or record.step == self.steps:
            width = len(f"{self.steps}")
            step = f"step {record.step:{width}}/{self.steps}"
            self.say(f"{step}  loss {loss}  norm {norm}  lr {lr}  {rate} tokens/s  {left}")

    def evaluated(self, record: EvalRecord) -> None:
        bits = "" if record.bits_per_byte is None else f", {record.bits_per_byte:.3f} bits per byte"
        self.say(f"step {record.step}: {record.name.replace('held_out', 'held-out')} loss {record.loss:.4f}{bits}")

    def saved(self, step: int, path: Path) -> None:
        self.say(f"step {step}: saved {path}")

    def close(self) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def _drawn(self, step: int, left: str, figures: str) -> Table:
        """A bar as wide as the window, and the figures under it."""
        bar = Table.grid(padding=(0, 1, 0, 0), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_row(f"step {step}/{self.steps}", ProgressBar(total=self.steps, completed=step), left)
        both = Table.grid(expand=True)
        both.add_row(bar)
        both.add_row(figures)
        return both

    def say(self, line: str, *, by_words: bool = False) -> None:
        """A line of its own, above what is kept up to date; `by_words`, a terminal breaks it between words."""
        # When nobody reads any more (`| head`, a closed `tee`), rich ends the program; the run goes on, unheard.
        with suppress(SystemExit, BrokenPipeError):
            self.console.print(line, highlight=False, soft_wrap=not (by_words and self.console.is_terminal))

    def _left(self, step: int) -> timedelta:
        """Time until the last step, at the speed so far."""
        seconds = (time.monotonic() - self._begin) / (step - self._after) * (self.steps - step)
        return timedelta(seconds=round(seconds))
