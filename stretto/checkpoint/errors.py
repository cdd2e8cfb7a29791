"""The one error of saving and loading."""

from __future__ import annotations

WAY_OUT = "restore the file from a copy, or load an earlier checkpoint"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message is the same on every rank."""


def describe(error: BaseException) -> str:
    """The error's own words when they are ours, else its type as well."""
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
