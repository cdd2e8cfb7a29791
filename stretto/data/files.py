"""Regular files below a directory, and an account of all that is passed over there.

A named pipe blocks whoever opens it, a device may never end: neither is ever read. A file is looked at before it is
opened, and once more after it was opened without waiting, since another may stand under its name by then.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from stretto.data.errors import DataError

FIRST_NAMES: Final = 3
"""Of the files passed over for one reason, so many are named."""

_NAME_LENGTH = 80


@dataclass(frozen=True)
class PassedOver:
    """How many files gave no document, by reason, and the first names of each, in order."""

    reasons: Mapping[str, tuple[int, tuple[str, ...]]]

    @classmethod
    def of(cls, found: Iterable[tuple[str, str]]) -> PassedOver:
        """From pairs of a reason and a name."""
        counts: dict[str, int] = {}
        names: dict[str, list[str]] = {}
        for reason, name in found:
            counts[reason] = counts.get(reason, 0) + 1
            first = names.setdefault(reason, [])
            if len(first) < FIRST_NAMES:
                first.append(name if len(name) <= _NAME_LENGTH else f"...{name[3 - _NAME_LENGTH :]}")
        return cls({reason: (count, tuple(names[reason])) for reason, count in sorted(counts.items())})

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> PassedOver:
        """From what `as_json` gave. Raises ValueError for anything else."""
        reasons = {}
        for reason, (count, names) in said.items():
            if not isinstance(count, int) or not all(isinstance(name, str) for name in names):
                raise ValueError(f"{reason!r} has no count and names")
            reasons[reason] = (count, tuple(names[:FIRST_NAMES]))
        return cls(reasons)

    def __add__(self, other: PassedOver) -> PassedOver:
        both = {}
        for reason in sorted({*self.reasons, *other.reasons}):
            (count, names), (more, others) = self.reasons.get(reason, _NONE), other.reasons.get(reason, _NONE)
            both[reason] = (count + more, (names + others)[:FIRST_NAMES])
        return PassedOver(both)

    @property
    def total(self) -> int:
        """Files, whatever the reason."""
        return sum(count for count, _ in self.reasons.values())

    def as_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return {reason: [count, list(names)] for reason, (count, names) in self.reasons.items()}

    def __str__(self) -> str:
        """2 binary (a.png, b.png), 1 hidden (.git): what would steer a terminal is shown as `?`."""
        said = []
        for reason, (count, names) in self.reasons.items():
            more = ", ..." if count > len(names) else ""
            said.append(f"{count:,} {reason} ({', '.join(map(_printable, names))}{more})")
        return ", ".join(said)


_NONE: Final[tuple[int, tuple[str, ...]]] = (0, ())


def walk(root: Path, skip: frozenset[str] = frozenset()) -> tuple[list[str], PassedOver]:
    """Relative names of the regular files below `root`, sorted, and what is none of them.

    Neither hidden files and folders nor folders in `skip` are entered. A link to a file counts as that file; a folder
    behind a link is passed over, as it may lead back here.
    """
    names: list[str] = []
    passed: list[tuple[str, str]] = []
    for folder, folders, files in os.walk(root):
        here = os.path.relpath(folder, root)
        below = "" if here == "." else f"{here}{os.sep}"
        for name in folders:
            if name.startswith("."):
                passed.append(("hidden", f"{below}{name}/"))
            elif name not in skip and os.path.islink(os.path.join(folder, name)):  # noqa: PTH118, PTH114 (many files)
                passed.append(("folder behind a link", f"{below}{name}"))
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
        for name in files:
            reason = "hidden" if name.startswith(".") else _not_regular(f"{folder}{os.sep}{name}")
            if reason is None:
                names.append(below + name)
            else:
                passed.append((reason, below + name))
    return sorted(names), PassedOver.of(sorted(passed))


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read, without ever waiting for it. Raises OSError, DataError where it is none."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"{path} is a pipe, socket, device or directory now, and no file any more")
    return os.fdopen(descriptor, "rb")


def _not_regular(path: str) -> str | None:
    """Why a directory's entry is no regular file, links followed; None when it is one."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 (many files)
    except OSError:
        return "link that leads nowhere"
    return None if stat.S_ISREG(mode) else "pipe, socket or device"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
