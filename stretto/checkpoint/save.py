"""Write a checkpoint: all of it, or nothing that could be taken for one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from stretto.checkpoint.contents import Contents, Place, write_contents
from stretto.checkpoint.directory import abandon, prepare, settle, step_path
from stretto.checkpoint.marker import EXTRA, complete, write_atomically
from stretto.checkpoint.peers import CheckpointError, Peers
from stretto.checkpoint.planner import described, whole_tensors
from stretto.checkpoint.writer import write_pieces
from stretto.params import Slice
from stretto.world import World


def save(
    directory: str | Path,
    step: int,
    slices: Sequence[Slice],
    extra: Mapping[str, Any],
    world: World,
    *,
    group: ProcessGroup | None = None,
) -> Path:
    """Write `slices` of all ranks and rank 0's `extra` to `<directory>/step-<step>`, and return that path.

    Every rank of `world` calls it with what it holds; among equal pieces exactly one has `owner` set and is
    written. Together the owners must tile every tensor. `directory` lies on a file system that all ranks see.
    `extra` comes back from `load` as JSON gives it back: tuples become lists.

    Args:
        group: spans exactly the ranks of `world`; None is torch's default group. A world of one needs none.

    Raises:
        CheckpointError: on every rank, if any rank failed. Nothing of the step is left, and the checkpoints
            before it, one of the same step included, are untouched.
    """
    peers = Peers.of(world, group)
    path = step_path(Path(directory), step)
    peers.require_same("directories to save in", str(path))
    doing = f"saving step {step} to {path}"
    with peers.on_all_ranks(doing):
        document = json.dumps(dict(extra), indent=1).encode() if peers.rank == 0 else b""
    with peers.on_all_ranks(doing):
        if peers.rank == 0:
            prepare(path)
    try:
        contents = _write(path, slices, peers, doing)
        with peers.on_all_ranks(doing):
            if contents is not None:
                write_contents(path, contents)
                write_atomically(path / EXTRA, document)
                complete(path, step, peers.size, {place.file for place in contents.places.values()})
    except CheckpointError:
        if peers.rank == 0:  # all ranks have stopped writing: the failure was agreed on
            abandon(path)
        raise
    with peers.on_all_ranks(f"{path} is complete; removing the one of the same step that it replaces"):
        if peers.rank == 0:
            settle(path)
    return path


def _write(path: Path, slices: Sequence[Slice], peers: Peers, doing: str) -> Contents | None:
    """Write this rank's pieces; on rank 0, what all ranks have written."""
    with peers.on_all_ranks(doing):
        mine = described(slices)
    said = peers.collect(mine)
    tensors = {}
    with peers.on_all_ranks(doing):
        if said is not None:
            tensors = whole_tensors(said)
    with peers.on_all_ranks(doing):
        written = write_pieces(path, peers.rank, slices)
    places = peers.collect(written)
    if places is None:
        return None
    return Contents(tensors, {(name, tuple(at)): Place(*place) for rank in places for name, at, *place in rank})
