"""Text that a tokenizer does not give back.

A BPE without bytes and without an unknown token drops each character that it has no token for; one with an unknown
token, or one that folds case, gives something else back. A model never sees what was lost, so bits of its loss over the
bytes of the whole text would be too few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Lost:
    """How many bytes of text did not come back, of so many that were decoded and compared; what most of them were."""

    bytes: int = 0
    of: int = 0
    most: str = ""

    @classmethod
    def between(cls, text: str, decoded: str) -> Lost:
        """Bytes of the characters of `text`, each as often as it is there, that `decoded` does not have.

        What was added (a space before a word, the name of an unknown token) does not count, nor does order.
        """
        size = len(text.encode("utf-8"))
        if text == decoded:
            return cls(0, size)
        missing = Counter(text) - Counter(decoded)
        lost = sum(len(c.encode("utf-8")) * count for c, count in missing.items())
        return cls(lost, size, max(missing, key=lambda c: missing[c] * len(c.encode("utf-8")), default=""))

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Lost:
        """From what `as_json` gave. Raises ValueError, KeyError for anything else."""
        lost, of, most = said["bytes"], said["of"], said["most"]
        if not (isinstance(lost, int) and isinstance(of, int) and 0 <= lost <= of and isinstance(most, str)):
            raise ValueError(f"{lost!r} of {of!r} bytes lost, {most!r} above all")
        return cls(lost, of, most[:1])

    def __add__(self, other: Lost) -> Lost:
        return Lost(self.bytes + other.bytes, self.of + other.of, (self if self.bytes >= other.bytes else other).most)

    @property
    def share(self) -> float:
        """In 0..1."""
        return self.bytes / self.of if self.of else 0.0

    def as_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"bytes": self.bytes, "of": self.of, "most": self.most}

    def __str__(self) -> str:
        """12.3% of the text, above all 'ü' (U+00FC); in ASCII."""
        share = f"{self.share:.1%}" if self.share >= 0.001 else f"{self.share:.1e}"
        return f"{share} of the text" + (f", above all {self.most!a} (U+{ord(self.most):04X})" if self.most else "")
