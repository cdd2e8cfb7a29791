"""Write pieces with torch.distributed.checkpoint, and beside each file the checksums of its pieces.

torch.load does not look at the checksums inside its files, so weights with a flipped bit would load in silence.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StoragePrefix
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from stretto.checkpoint.marker import write_atomically
from stretto.params import Slice

CHECKSUMS = ".crc32"
"""`__0_0.distcp.crc32`: JSON, offset of each piece in `__0_0.distcp` -> CRC-32 of its bytes."""


class _Live:
    """All that DCP's writer asks of a planner: the tensor of an item, which it copies to the CPU."""

    def __init__(self, slices: Sequence[Slice]) -> None:
        self._tensors = {_index(s): s.tensor for s in slices}

    def resolve_data(self, item: WriteItem) -> Tensor:
        return self._tensors[item.index].detach()


def write_pieces(path: Path, rank: int, slices: Sequence[Slice]) -> list[list[Any]]:
    """Write the pieces that this rank owns to one file, safe on disk, and their checksums to another.

    Returns:
        Of each piece its name, offsets, file, offset in it and length; none of empty ones.
    """
    owned = [s for s in slices if s.owner and s.tensor.numel()]
    if not owned:
        return []
    path.mkdir(parents=True, exist_ok=True)  # on another node's own disk it is not there: rank 0 will say so
    plan = SavePlan([_item(s) for s in owned], storage_data=_StoragePrefix(f"__{rank}_"))
    # No step of this library in which ranks talk is taken: they would pass pickles.
    written = FileSystemWriter(path, sync_files=True).write_data(plan, cast(SavePlanner, _Live(owned))).wait()
    return _sum_up(path, written)


def _sum_up(path: Path, written: Sequence[WriteResult]) -> list[list[Any]]:
    """Read the file back, mostly from the page cache."""
    sums: dict[str, dict[int, int]] = {}
    places: list[list[Any]] = []
    for result in written:
        index, info = result.index, result.storage_data
        assert index.offset is not None
        with (path / info.relative_path).open("rb") as stream:
            stream.seek(info.offset)
            sums.setdefault(info.relative_path, {})[info.offset] = zlib.crc32(stream.read(info.length))
        places.append([index.fqn, list(index.offset), info.relative_path, info.offset, info.length])
    for name, of_pieces in sums.items():
        write_atomically(path / (name + CHECKSUMS), json.dumps(of_pieces).encode())
    return places


def _index(s: Slice) -> MetadataIndex:
    return MetadataIndex(s.name, s.offsets)


def _item(s: Slice) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(s.offsets), s.tensor.shape)
    data = TensorWriteData(chunk, TensorProperties(dtype=s.tensor.dtype), torch.Size(s.full_shape))
    return WriteItem(_index(s), WriteItemType.SHARD, tensor_data=data)
