"""Files and texts that somebody else may have written, read within bounds.

Whoever reads settings, a checkpoint's JSON or a tokenizer's asks here: only regular files are opened (a pipe blocks for
ever, a device never ends), no more is taken into memory than `largest`, a byte order mark is skipped, and nesting that
would exhaust the stack is an error like any other. `shown` quotes a foreign value in a message.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from reprlib import Repr
from typing import Any, Final

LARGEST: Final = 2**24
"""Bytes of JSON that are read at most: twice what the marker of a checkpoint of 131,072 ranks takes."""

DEEPEST: Final = 64
"""Levels of lists and tables within each other; our own files have fewer than ten."""

MANY_DIGITS: Final = 10**30


class UnreadableError(ValueError):
    """A file or text cannot be used; the message says why and does not name it."""


def read_bytes(path: Path, largest: int = LARGEST) -> bytes:
    """All of a regular file. Raises UnreadableError, for whatever the system says too."""
    try:
        if not stat.S_ISREG((found := path.stat()).st_mode):
            raise UnreadableError("it is not a regular file")
        if found.st_size > largest:
            raise UnreadableError(f"it has {found.st_size:,} bytes, at most {largest:,} are read")
        with path.open("rb") as file:
            return file.read(found.st_size)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise error if isinstance(error, UnreadableError) else UnreadableError(reason(error)) from error


def read_text(path: Path, largest: int = LARGEST) -> str:
    """All of a file of UTF-8, without its byte order mark."""
    return decoded(read_bytes(path, largest))


def read_json(path: Path, largest: int = LARGEST) -> Any:
    """What a file of JSON says."""
    return parse_json(read_bytes(path, largest))


def decoded(content: bytes) -> str:
    """UTF-8, without its byte order mark."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"it is not UTF-8 (byte {error.start})") from error


def parse_json(content: bytes) -> Any:
    """What JSON says. Raises UnreadableError for what is none, and for more than `DEEPEST` levels."""
    try:
        value = json.loads(decoded(content))
    except RecursionError:
        raise UnreadableError(too_deep()) from None
    except ValueError as error:
        raise error if isinstance(error, UnreadableError) else UnreadableError(f"it is no JSON: {error}") from error
    return shallow(value)


def shallow(value: Any) -> Any:
    """The same value. Raises UnreadableError where lists and tables are nested deeper than `DEEPEST`."""
    level = [value]
    for _ in range(DEEPEST):
        tables = [each for each in level if isinstance(each, (dict, list, tuple))]
        level = [child for each in tables for child in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return value
    if any(isinstance(each, (dict, list, tuple)) for each in level):
        raise UnreadableError(too_deep())
    return value


def reason(error: Exception) -> str:
    """Why a file could not be used, in the system's words where it has some."""
    return getattr(error, "strerror", None) or str(error)


def shown(value: object, longest: int = 80) -> str:
    """A foreign value as a message quotes it, however large or deep it is."""
    if isinstance(value, int) and not isinstance(value, bool) and not -MANY_DIGITS < value < MANY_DIGITS:
        return f"a number of {value.bit_length()} bits"
    short = Repr()
    short.maxlevel, short.maxstring, short.maxother = 3, longest, longest
    short.maxdict = short.maxlist = short.maxtuple = 6
    text = short.repr(value)
    return text if len(text) <= longest else f"{text[: longest - 4]} ..."


def too_deep() -> str:
    """What is said of nesting that is not read."""
    return f"lists and tables are nested deeper than {DEEPEST} levels"
