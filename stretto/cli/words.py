"""The settings that a command trains with, or talks of: those of the demo where the user names no others."""

from __future__ import annotations

from functools import partial
from typing import Final

from stretto.arguments import Resolved, parse
from stretto.initialize.gpus import visible_gpus

FALLBACK: Final = "demo"
"""The preset that every command starts from where its words name neither a preset nor a file."""

parse_or_demo: Final = partial(parse, fallback=FALLBACK)
"""`stretto.arguments.parse` for the words of a command."""

parse_for_here: Final = partial(parse_or_demo, gpus=visible_gpus)
"""The same for a run on this machine: device and processes follow from its GPUs where nobody says them."""


def origin(resolved: Resolved) -> str | None:
    """Which preset the run starts from, where nobody named it."""
    if resolved.fallback is None:
        return None
    return f"{resolved.fallback}, as neither --preset nor --config is given"
