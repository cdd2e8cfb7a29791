"""A lock that the kernel drops when its holder dies, and in which the holder says how far it is."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stretto.data.errors import DataError

_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP})
"""What a file system without locks answers."""

_LINE: Final = 512
"""Bytes of what a holder says: always as many, so that a reader never sees half of it."""

_LONGEST_PAUSE: Final = 1.0
"""Seconds between two looks of one who waits: a thousand may wait, at one file server."""


@dataclass(frozen=True)
class Progress:
    """Bytes of text that `who` has tokenized, of about so many."""

    done: int
    total: int
    who: str


Tell = Callable[[Progress], None]


class Lock:
    """The lock file at `path`, open; made by `opened`.

    It saves work and is not needed to be right: on a file system without locks everybody holds it, and `alone` is
    False.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        self.alone = True

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator[Lock]:
        """The lock, not taken yet; at the end it is free again."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            yield cls(path, descriptor)
        finally:
            os.close(descriptor)

    def take(self) -> bool:
        """Take it, unless somebody has it."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self.alone = False
        return True

    def wait(self, timeout: float, tell: Tell) -> None:
        """Take it as soon as it is free. Raises DataError when its holder makes no progress for `timeout` seconds.

        Time is that of this process alone, from the last change that it saw: clocks of hosts differ.
        """
        heard, since, pause = self._heard(), time.monotonic(), 0.02
        while not self.take():
            if (now := self._heard()) != heard:
                heard, since = now, time.monotonic()
                if (progress := _parsed(now)) is not None:
                    tell(progress)
            elif time.monotonic() - since > timeout:
                last = _parsed(heard)
                raise DataError(
                    f"waited {timeout:g} s for {last.who if last else 'another process'} to build {self.path.parent}, "
                    "and it made no progress; end it, or build beforehand with `stretto data build`"
                )
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE)

    def say(self, done: int, total: int) -> None:
        """As the holder: leave word of the progress for those who wait."""
        said = json.dumps([done, total, os.getpid(), socket.gethostname()[:200]])
        os.pwrite(self._descriptor, said.encode().ljust(_LINE), 0)

    def _heard(self) -> bytes:
        return os.pread(self._descriptor, _LINE, 0)


def _parsed(line: bytes) -> Progress | None:
    """What a holder said; None where it said nothing that can be read."""
    try:
        done, total, process, host = json.loads(line)
        return Progress(int(done), int(total), f"process {int(process)} on {ascii(host)[1:-1]}")
    except (ValueError, TypeError):
        return None
