"""Checkpoints: any layout writes, any other reads, and a half-written one is never taken for a whole one.

docs/checkpoints.md says what lies in the directory and why it survives a crash at any byte. What lists, verifies and
writes files imports no torch: the writer process and `stretto checkpoint` start at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stretto.checkpoint.directory import Found, Skipped, latest_complete, prune
    from stretto.checkpoint.errors import CheckpointError
    from stretto.checkpoint.load import load
    from stretto.checkpoint.save import save
    from stretto.checkpoint.saver import Saved, Saver

__all__ = ["CheckpointError", "Found", "Saved", "Saver", "Skipped", "latest_complete", "load", "prune", "save"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    modules = {"CheckpointError": "errors", "load": "load", "save": "save", "Saved": "saver", "Saver": "saver"}
    found = getattr(import_module(f"{__name__}.{modules.get(name, 'directory')}"), name)
    globals()[name] = found  # a submodule of the same name must not hide it
    return found
