"""What is said to a person: no character of a foreign text steers a terminal, and every terminal can show what we say.

Records, files, other ranks and models of bytes supply text that ends in messages. `printable` is where its control
characters go; `say` and `stretto.console` pass everything through it.
"""

from __future__ import annotations

import codecs
import io
import sys
from typing import Final

HANDLER: Final = "stretto"
"""The name under which Python's codecs know `_instead`."""

_INSTEAD: Final = dict(zip("·→…✓✗━╸╺─░▒▓▁▂▃▄▅▆▇█", ".>.+x----.:#12345678", strict=True))
"""What an ASCII terminal shows of the characters that our own tables and pictures have; of a loss curve, its height."""


def printable(text: str) -> str:
    """`text` with whatever a terminal would not show as a character (controls, directions, half characters) as dots."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else "·" for c in text)


def say(text: object, *, out: bool = False, end: str = "\n") -> None:
    """A message on standard error, or `out` on standard output."""
    print(printable(f"{text}"), end=end, file=sys.stdout if out else sys.stderr, flush=True)


def hand_on(text: str) -> None:
    """A file on standard output: byte for byte for a program that reads it, printable on a terminal."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)


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
