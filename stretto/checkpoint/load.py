"""Read a checkpoint into live tensors, in whatever layout they lie now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from stretto.checkpoint.directory import Found
from stretto.checkpoint.index import Index
from stretto.checkpoint.marker import inspect, read_extra, read_marker
from stretto.checkpoint.peers import Peers
from stretto.checkpoint.places import place
from stretto.checkpoint.planner import reads, require_same_tensors, wanted
from stretto.checkpoint.reader import read_pieces
from stretto.params import Slice
from stretto.world import World


def load(
    path: str | Path | Found,
    slices: Sequence[Slice],
    world: World,
    *,
    group: ProcessGroup | None = None,
    prefixes: Sequence[str] = ("",),
) -> dict[str, Any]:
    """Fill every slice's tensor, bitwise, from the checkpoint `path`, and return its `extra`.

    Ranks may be more or fewer than wrote it, and cut in any other way. Each reads only what it holds.

    Args:
        path: a checkpoint, or what `latest_complete` found.
        group: spans exactly the ranks of `world`; None is torch's default group. A world of one needs none.
        prefixes: every tensor of the checkpoint whose name starts with one of them must be asked for by some
            rank; others may be left unread. `("model/",)` loads weights alone.

    Raises:
        CheckpointError: on every rank. Files are missing or damaged (tensors untouched); or the tensors of
            checkpoint and run differ in name, shape or type, all listed (tensors untouched); or a read failed
            half-way (tensors undefined).
    """
    peers = Peers.of(world, group)
    with peers.on_all_ranks("loading what was found"):
        path = place(path.checkpoint if isinstance(path, Found) else path)
    peers.require_same("checkpoints to load", str(path))
    doing = f"loading {path}"
    with peers.on_all_ranks(doing):
        if peers.rank == 0:  # one rank looks at all files, for all: the others would look at the same
            inspect(path)
    with peers.on_all_ranks(doing):
        extra = read_extra(path)
        contents = Index(path, read_marker(path))
        mine = wanted(contents, slices)
    said = peers.collect(mine)
    with peers.on_all_ranks(doing):
        if said is not None:
            require_same_tensors(contents, said, prefixes)
    with peers.on_all_ranks(doing):
        read_pieces(path, list(reads(contents, slices)))
    return extra
