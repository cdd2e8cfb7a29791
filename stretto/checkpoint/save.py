"""Write a checkpoint: all of it, or nothing that could be taken for one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from stretto.checkpoint.commit import commit
from stretto.checkpoint.directory import abandon, prepare, step_path
from stretto.checkpoint.errors import CheckpointError
from stretto.checkpoint.part import write_part
from stretto.checkpoint.peers import Peers
from stretto.checkpoint.places import place
from stretto.checkpoint.planner import described, numbers
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
    written. Together the owners must tile every tensor. `directory` lies on a file system that all ranks see, or is
    a URL such as `s3://bucket/run`. `extra` comes back from `load` as JSON gives it back: tuples become lists.

    Args:
        group: spans exactly the ranks of `world`; None is torch's default group. A world of one needs none.

    Raises:
        CheckpointError: on every rank, if any rank failed. Nothing of the step is left, and the checkpoints
            before it, one of the same step included, are untouched.
    """
    peers = Peers.of(world, group)
    path = step_path(place(directory), step)
    peers.require_same("directories to save in", str(path))
    doing = f"saving step {step} to {path}"
    with peers.on_all_ranks(doing):
        document = json.dumps(dict(extra), indent=1).encode() if peers.rank == 0 else b""
        mine, owned = described(slices)
    with peers.on_all_ranks(doing):
        if peers.rank == 0:
            prepare(path)
    try:
        with peers.on_all_ranks(doing):
            path.mkdir(parents=True, exist_ok=True)  # on another node's own disk it is not there: rank 0 will say so
            write_part(path, peers.rank, _TOKEN, mine, lambda i: numbers(owned[i]))
        with peers.on_all_ranks(doing):
            if peers.rank == 0:
                commit(path, step, peers.size, _TOKEN, document)
    except CheckpointError:
        if peers.rank == 0:  # all ranks have stopped writing: the failure was agreed on
            abandon(path)
        raise
    return path


_TOKEN = "0"
"""All ranks are in this save, so no other can be under way."""
