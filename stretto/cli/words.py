"""The settings that a command trains with, or talks of: those of the demo where the user names no others."""

from __future__ import annotations

from functools import partial
from typing import Final

from stretto.arguments import Resolved, parse
from stretto.cli.adopt import adopted

FALLBACK: Final = "demo"
"""The preset that every command starts from where its words name neither a preset nor a file."""

parse_or_demo: Final = partial(parse, fallback=FALLBACK, adopt=adopted)
"""`stretto.arguments.parse` for the words of a command."""


def origin(resolved: Resolved) -> str | None:
    """Which preset the run starts from, where nobody named it."""
    if resolved.fallback is None:
        return None
    return f"{resolved.fallback}, as neither --preset nor --config is given"
