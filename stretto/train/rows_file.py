"""Lines of JSON that are appended to a file while a run goes on, whatever the disk does."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from stretto.reading import reason

MOST: Final = 1 << 24
"""Bytes that wait for room: some thirty thousand steps."""


class RowsFile:
    """A file of rows, begun with `kept` and appended to. What a full disk does not take waits until there is room.

    No figure is worth the run: of what cannot be written a warning tells, once, and at the end of what was lost.
    """

    def __init__(self, path: Path, kept: Sequence[str] = ()) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")  # killed now, the run still has all rows
        try:
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            temporary.replace(path)
        except OSError as error:  # a full disk: nothing runs yet
            raise OSError(error.errno, error.strerror, f"{path}") from error
        self._path, self._file = path, path.open("ab", buffering=0)
        self._waiting, self._lost, self._full = bytearray(), 0, False

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        line = f"{json.dumps(row)}\n".encode()
        if len(self._waiting) + len(line) <= MOST:
            self._waiting += line
        else:
            self._lost += 1
        self._flush()

    def close(self) -> None:
        """Write what waits, or say what is lost."""
        self._flush()
        if lost := self._lost + self._waiting.count(b"\n"):
            logging.getLogger(__name__).warning("%s lacks %d rows, for which there was no room", self._path, lost)
        self._file.close()

    def _flush(self) -> None:
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
        except OSError as error:
            if not self._full:
                logging.getLogger(__name__).warning(
                    "%s: %s; the run goes on, and its rows wait for room", self._path, reason(error)
                )
            self._full = True
        else:
            self._full = False
