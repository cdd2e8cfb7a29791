"""Write a checkpoint: all of it, or nothing that could be taken for one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import state_dict_saver

from stretto.checkpoint.directory import abandon, prepare, settle, step_path
from stretto.checkpoint.marker import EXTRA, complete, write_atomically
from stretto.checkpoint.peers import CheckpointError, Peers
from stretto.checkpoint.planner import SliceSavePlanner
from stretto.checkpoint.reader import SafeReader
from stretto.checkpoint.writer import CheckedWriter
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
        _write(path, slices, peers, doing)
        with peers.on_all_ranks(doing):
            if peers.rank == 0:
                write_atomically(path / EXTRA, document)
                complete(path, step, peers.size, SafeReader(path).files())
    except CheckpointError:
        if peers.rank == 0:  # all ranks have stopped writing: the failure was agreed on
            abandon(path)
        raise
    with peers.on_all_ranks(f"{path} is complete; removing the one of the same step that it replaces"):
        if peers.rank == 0:
            settle(path)
    return path


def _write(path: Path, slices: Sequence[Slice], peers: Peers, doing: str) -> None:
    with peers.reported(doing), quiet_when_alone():
        state_dict_saver.save(
            {},
            storage_writer=CheckedWriter(path, sync_files=True),
            planner=SliceSavePlanner(slices),
            process_group=peers.group,
            no_dist=peers.alone,
        )


@contextmanager
def quiet_when_alone() -> Iterator[None]:
    """DCP warns that a single process is a single process; here that is a size like any other."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
