"""The one error of saving and loading."""

from __future__ import annotations

import errno
from typing import Final

RESTORE = "restore the file from a copy"
WAY_OUT = f"{RESTORE}, or load an earlier checkpoint"
FREE_SPACE = "free space there, or keep fewer checkpoints; those that are whole are as they were, to go on from"
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message is the same on every rank."""


def describe(error: BaseException) -> str:
    """The error's own words when they are ours, else its type as well; of a full disk, what to do."""
    if isinstance(error, CheckpointError):
        return str(error)
    full = isinstance(error, OSError) and error.errno in _FULL
    return f"{type(error).__name__}: {error}{f'; {FREE_SPACE}' if full else ''}"
