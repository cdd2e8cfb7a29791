"""What is said to a person: no character of a foreign text steers a terminal, and every terminal can show what we say.

Records, files, other ranks and models of bytes supply text that ends in messages. `printable` is where its control
characters go; `say` and `stretto.console` pass everything through it.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from contextlib import contextmanager, suppress

TYPE_CHECKING = False  # `typing` is much to load before a command can answer Ctrl-C
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO, Final

HANDLER: Final = "stretto"
"""The name under which Python's codecs know `_instead`."""

OUTPUT: Final = "standard output"

GONE: Final = (errno.EIO, errno.EPIPE)
"""Errors of a stream that nobody will read any more: a terminal that was closed, a pipe."""

_INSTEAD: Final = dict(zip("·→…✓✗━╸╺─░▒▓▁▂▃▄▅▆▇█", ".>.+x----.:#12345678", strict=True))
"""What an ASCII terminal shows of the characters that our own tables and pictures have; of a loss curve, its height."""


def printable(text: str) -> str:
    """`text` with whatever a terminal would not show as a character (controls, directions, half characters) as dots."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else "·" for c in text)


def say(text: object, *, out: bool = False, end: str = "\n") -> None:
    """A message on standard error, or `out` on standard output; where standard error is gone nobody hears it."""
    if out:
        with named_in_errors(sys.stdout) as stream:
            print(printable(f"{text}"), end=end, file=stream, flush=True)
        return
    try:
        print(printable(f"{text}"), end=end, file=sys.stderr, flush=True)
    except OSError as error:
        if error.errno in GONE:
            silence(sys.stderr)


def direct(stream: IO[str]) -> IO[str]:
    """`stream` itself, where rich has put something in its place while it keeps a bar up to date."""
    proxied: IO[str] = getattr(stream, "rich_proxied_file", stream)
    return proxied


def hand_on(text: str) -> None:
    """A file on standard output: byte for byte for a program that reads it, printable on a terminal."""
    with named_in_errors(sys.stdout) as stream:
        stream.write(printable(text) if stream.isatty() else text)
        stream.flush()


@contextmanager
def named_in_errors(stream: IO[str]) -> Iterator[IO[str]]:
    """Within, an error of writing to standard output or error, such as a full disk, is an OSError that says where."""
    try:
        yield stream
    except BrokenPipeError:  # nobody reads any more, which is no error
        raise
    except OSError as error:
        names = {direct(sys.stdout): OUTPUT, direct(sys.stderr): "standard error"}
        raise OSError(error.errno, error.strerror, names.get(direct(stream), error.filename)) from error


def silence(stream: IO[str]) -> None:
    """What could not be written is not tried again when the interpreter ends."""
    with suppress(OSError, ValueError):  # a stream of another kind, or closed
        if (number := direct(stream).fileno()) in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def require_streams() -> None:
    """What was started with standard streams closed has some that show nothing.

    Without, the next file that is opened would get their number, and whatever a library prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # has the lowest number that is free
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def speak_any_encoding() -> None:
    """From here on no character makes standard output or error raise: what an encoding lacks has a stand-in."""
    codecs.register_error(HANDLER, _instead)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=HANDLER)


def _instead(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_INSTEAD.get(c, "?") for c in error.object[error.start : error.end]), error.end
