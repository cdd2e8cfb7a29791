"""What a fault is: one textual replacement in one file of the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fault:
    """`name` in words; `old` in `file` of the package becomes `new`."""

    name: str
    file: str
    old: str
    new: str

    def times(self, package: Path) -> int:
        """How often `old` stands there: a fault fits only once."""
        path = package / self.file
        return path.read_text().count(self.old) if path.exists() else 0

    def put_into(self, package: Path) -> None:
        """Replace it in a copy of the package. Raises ValueError unless `old` stands there exactly once."""
        if (times := self.times(package)) != 1:
            raise ValueError(f"{self.name!r}: {self.old!r} stands {times} times in {self.file}")
        path = package / self.file
        path.write_text(path.read_text().replace(self.old, self.new))


class Said:
    """The faults that a test file says it catches; `only` names one of its tests where they all take long."""

    def __init__(self, file: str, *faults: Fault, only: str = "") -> None:
        self.file, self.faults = file, faults
        self.test = f"{file}::{only}" if only else file
