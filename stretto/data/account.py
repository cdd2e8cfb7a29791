"""What is known of a corpus besides its tokens: files passed over, text lost by a tokenizer, what a model must beat."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from stretto.data.baselines import Baselines
from stretto.data.errors import DataError
from stretto.data.files import PassedOver
from stretto.data.lost import Lost

_LARGEST: Final = 1 << 20


@dataclass(frozen=True)
class Account:
    """Of a part of a corpus, or of all of it: accounts of parts add up."""

    passed: PassedOver = field(default=PassedOver({}))
    train: Lost = field(default=Lost())
    """Of a sample of the documents to train on."""
    held_out: Lost = field(default=Lost())
    """Of all held-out documents."""
    lowest: float = 1.0
    """The lowest `position` of a document, and the highest."""
    highest: float = 0.0
    baselines: Baselines | None = None

    @classmethod
    def read(cls, path: Path, key: str) -> Account:
        """What `write` wrote under the same key. Raises DataError when it is missing, damaged or of another key."""
        try:
            with path.open("rb") as file:
                said = json.loads(file.read(_LARGEST))
            if said["key"] != key:
                raise ValueError("made from something else")
            return cls.from_json(said)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path} is no account of a corpus ({error}); delete it") from error

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Account:
        """From what `as_json` gave. Raises ValueError, KeyError, TypeError or AttributeError for anything else."""
        return cls(
            PassedOver.from_json(said["passed"]),
            Lost.from_json(said["train"]),
            Lost.from_json(said["held_out"]),
            float(said["lowest"]),
            float(said["highest"]),
            _baselines(said["baselines"]),
        )

    def as_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "passed": self.passed.as_json(),
            "train": self.train.as_json(),
            "held_out": self.held_out.as_json(),
            "lowest": self.lowest,
            "highest": self.highest,
            "baselines": asdict(self.baselines) if self.baselines else None,
        }

    def write(self, path: Path, key: str) -> None:
        """Appears at `path` whole, after it is on disk."""
        said = {"key": key, **self.as_json()}
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w") as file:
                json.dump(said, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def __add__(self, other: Account) -> Account:
        """Of both; the baselines of neither, as they do not add up."""
        return Account(
            self.passed + other.passed,
            self.train + other.train,
            self.held_out + other.held_out,
            min(self.lowest, other.lowest),
            max(self.highest, other.highest),
        )

    @property
    def lost(self) -> Lost:
        """Of all text that was compared."""
        return self.train + self.held_out


def _baselines(said: Mapping[str, Any] | None) -> Baselines | None:
    if said is None:
        return None
    return Baselines(float(said["bigram"]), float(said["zlib"]), int(said["train_bytes"]), int(said["held_out_bytes"]))
