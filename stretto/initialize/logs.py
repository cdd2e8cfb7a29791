"""One logger for a run: rank 0 on the console, every rank in a file on request, JSON for machines."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from rich.logging import RichHandler

from stretto.console import console
from stretto.reading import reason
from stretto.terminal import printable, say

NAME = "stretto"

KNOWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""Attributes that every record has; the others are what the caller said with `extra=`."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, rank, logger, message, and what the caller gave as `extra`."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        extra = {name: value for name, value in vars(record).items() if name not in KNOWN}
        entry = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "rank": self._rank,
            "logger": record.name,
            "message": record.getMessage(),
            **extra,
        }
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class LineFormatter(logging.Formatter):
    """A line, however long, that steers no terminal it is shown on later; ranks but the first have their number."""

    def __init__(self, rank: int) -> None:
        who = f"[rank {rank}] " if rank else ""
        super().__init__(f"%(asctime)s %(levelname)s {who}%(message)s", "%Y-%m-%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class RankFile(logging.FileHandler):
    """A file of one rank. Where it cannot be written, that is said once, and the run goes on without."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._said = False
        path = directory / f"rank-{rank:05d}.jsonl"
        try:
            super().__init__(path, encoding="utf-8")
        except FileNotFoundError:  # of many ranks the first alone has to make it
            directory.mkdir(parents=True, exist_ok=True)
            super().__init__(path, encoding="utf-8")
        self.setFormatter(JsonFormatter(rank))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        """In place of the traceback that Python would print for each line."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._said:
            say(f"stretto: {self.baseFilename}: {reason(error)}; the run goes on without this log")
            self._said = True

    def close(self) -> None:
        """Also where the disk does not take what is left."""
        with suppress(OSError):
            super().close()


@contextmanager
def logging_as(
    rank: int,
    *,
    style: Literal["text", "json"] = "text",
    level: int = logging.INFO,
    directory: Path | None = None,
) -> Iterator[logging.Logger]:
    """Within, the `stretto` logger speaks for this rank; yields it.

    Rank 0 writes to standard error, coloured on a terminal; other ranks only what is a warning or worse, with their
    number. With `directory` every rank also writes everything to `rank-<number>.jsonl` there. Raises OSError where it
    cannot begin that file.
    """
    logger = logging.getLogger(NAME)
    handlers: list[logging.Handler] = [_console(rank, style)]
    handlers[0].setLevel(level if rank == 0 else max(level, logging.WARNING))
    if directory is not None:
        handlers.append(RankFile(directory, rank))
    before = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG if directory is not None else level)
    logger.propagate = False
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield logger
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(before[0])
        logger.propagate = before[1]


def _console(rank: int, style: Literal["text", "json"]) -> logging.Handler:
    if style == "json":
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonFormatter(rank))
        return handler
    if not sys.stderr.isatty():  # a file is searched by lines: none is cut at 80 columns
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(LineFormatter(rank))
        return handler
    rich = RichHandler(console=console(stderr=True, goes_on=True), show_path=False, rich_tracebacks=False, markup=False)
    if rank != 0:
        rich.setFormatter(logging.Formatter(f"[rank {rank}] %(message)s"))
    else:
        rich.setFormatter(logging.Formatter("%(message)s"))
    return rich
