"""What a model of somebody else can be rejected for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def of_a_run(directory: Path) -> str:
    """What to do with a directory that is no model, where it is that of a run or of a checkpoint."""
    if not any((directory / name).exists() for name in ("resolved.toml", "COMPLETE")):
        return ""
    return "; it is of a run: go on with it by --resume, or make a model of it with `stretto export`"


class InteropError(ValueError):
    """A directory that cannot be read as a model, or a model that cannot be written as one: all reasons."""

    def __init__(self, what: str, reasons: Sequence[str]) -> None:
        super().__init__(what if not reasons else what + "\n  " + "\n  ".join(reasons))
        self.what, self.reasons = what, tuple(reasons)

    def __reduce__(self) -> tuple[type[InteropError], tuple[str, tuple[str, ...]]]:
        return InteropError, (self.what, self.reasons)
