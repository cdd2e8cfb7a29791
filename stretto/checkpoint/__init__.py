"""Checkpoints: any layout writes, any other reads, and a half-written one is never taken for a whole one.

docs/checkpoints.md says what lies in the directory and why it survives a crash at any byte.
"""

from stretto.checkpoint.directory import Found, Skipped, latest_complete, prune
from stretto.checkpoint.load import load
from stretto.checkpoint.peers import CheckpointError
from stretto.checkpoint.save import save

__all__ = ["CheckpointError", "Found", "Skipped", "latest_complete", "load", "prune", "save"]
