"""Text that a model or a file made, for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` with its control characters, which a model of bytes makes like any other, as dots."""
    return "".join(c if c.isprintable() or c in "\n\t" else "·" for c in text)
