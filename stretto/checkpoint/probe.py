"""Whether checkpoints can be written to a directory, by all ranks: asked before the first step, not at the first save.

A directory on a node's own disk would otherwise be found out when a checkpoint lacks the parts of other nodes: with
saves that training does not wait for, nobody would raise.
"""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from stretto.checkpoint.errors import CheckpointError
from stretto.checkpoint.peers import Peers
from stretto.checkpoint.places import place

SEEN_SECONDS: Final = 3.0
"""How long a file system may take to show one host what another has written."""


def require_shared(said: str | Path, peers: Peers) -> None:
    """Rank 0 writes a small file, which all others must see; then it goes. All ranks call this together.

    Raises CheckpointError on all ranks where it cannot be written, or is not seen.
    """
    doing, name = "preparing to save", f".probe-{secrets.token_hex(8)}"
    with peers.on_all_ranks(doing):
        directory = place(said)  # the package of a store is needed on all ranks
        if peers.rank == 0:
            _write(directory, name)
    probe = directory / (peers.gather(name)[0] or name)
    try:
        with peers.on_all_ranks(doing):
            if not _seen(probe):
                raise CheckpointError(
                    f"what rank 0 has written to {said} cannot be seen here: the directory must lie on a file system "
                    "that all ranks share"
                )
    finally:
        if peers.rank == 0:
            with suppress(Exception):  # who may write may perhaps not remove
                probe.unlink()


def _write(directory: Path, name: str) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(b"checkpoints will be written here\n")
    except Exception as error:  # a store's client raises what it likes
        why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{directory} cannot be written to, and checkpoints are to lie there: {why}") from error


def _seen(probe: Path) -> bool:
    until, pause = time.monotonic() + SEEN_SECONDS, 0.01
    while not probe.exists():
        if time.monotonic() > until:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
    return True
