"""How far the tokenizing of a corpus is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import IO, Final

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from stretto.console import console
from stretto.data.lock import Progress

PATIENCE: Final = 2.0
"""Seconds of silence at first: a small corpus is done before anybody would read of it."""

BETWEEN: Final = 10.0
"""Seconds between two lines where there is no terminal."""

_TELLING: Final = 1e-3
"""The share that must be done before its pace tells when all will be."""


class Tokenizing:
    """Told of progress; made by `shown`."""

    def __init__(self, screen: Console, live: Live) -> None:
        self._console, self._live = screen, live
        self._begin, self._first, self._said = time.monotonic(), 0, 0.0
        self._who = ""

    @classmethod
    @contextmanager
    def shown(cls, file: IO[str]) -> Iterator[Tokenizing]:
        """Shows on `file` what it is told, and takes it away at the end."""
        screen = console(file=file, goes_on=True)
        live = Live(console=screen, refresh_per_second=4, transient=True)
        try:
            yield cls(screen, live)
        finally:
            live.stop()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.who != self._who:  # another one's pace, from here on
            self._who, self._begin, self._first = progress.who, now, progress.done
        if now - self._begin < PATIENCE:
            return
        figures = self._figures(progress, now)
        if self._console.is_terminal:
            self._live.start()
            self._live.update(_drawn(progress, figures))
        elif now - self._said > BETWEEN:
            self._said = now
            share = progress.done / max(progress.total, 1)
            self._console.print(f"tokenizing: {share:.0%}, {figures}", soft_wrap=True)

    def _figures(self, progress: Progress, now: float) -> str:
        rate = (progress.done - self._first) / max(now - self._begin, 1e-3)
        by = "" if progress.who == "this process" else f", by {progress.who}"
        if progress.done - self._first < progress.total * _TELLING:
            return f"{progress.done / 1e6:,.0f} of {progress.total / 1e6:,.0f} MB{by}"
        left = timedelta(seconds=round(max(progress.total - progress.done, 0) / rate))
        return f"{progress.done / 1e6:,.0f} of {progress.total / 1e6:,.0f} MB, {rate / 1e6:,.1f} MB/s, {left} left{by}"


def _drawn(progress: Progress, figures: str) -> Table:
    bar = Table.grid(padding=(0, 1, 0, 0), expand=True)
    bar.add_column(no_wrap=True)
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True)
    bar.add_row("tokenizing", ProgressBar(total=max(progress.total, 1), completed=progress.done), figures)
    return bar
