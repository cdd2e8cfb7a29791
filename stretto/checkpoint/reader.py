"""Read what torch.distributed.checkpoint wrote, but trust nothing that lies in the files.

Pieces are compared with their checksums: a flipped bit is an error that names the file, not a model that is
slightly wrong. `.metadata` is a pickle, and a pickle may name any function to call. A checkpoint is data that people
hand to each other, so only the types that DCP's metadata is made of are let in.
"""

from __future__ import annotations

import io
import json
import pickle
import zlib
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from stretto.checkpoint.marker import METADATA, WAY_OUT
from stretto.checkpoint.peers import CheckpointError
from stretto.checkpoint.writer import CHECKSUMS

_METADATA_TYPES = (
    "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties "
    "TensorStorageMetadata _MEM_FORMAT_ENCODING"
)
_ALLOWED = {("torch.distributed.checkpoint.metadata", name) for name in _METADATA_TYPES.split()} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
}


class SafeReader(FileSystemReader):
    """DCP's file reader with checked pieces, and a metadata file that can name no other code."""

    def read_metadata(self) -> Metadata:
        """The list of tensors, their pieces, and where in which file each piece lies."""
        file = Path(self.path) / METADATA
        try:
            with file.open("rb") as stream:
                metadata = _Unpickler(stream).load()
        except Exception as error:  # a damaged pickle may raise nearly anything
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{file} cannot be read ({reason}): load an earlier checkpoint") from error
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{file} holds a {type(metadata).__name__}, not the metadata of a checkpoint")
        for info in (metadata.storage_data or {}).values():
            name = info.relative_path
            if not isinstance(name, str) or name == ".." or Path(name).name != name:
                raise CheckpointError(f"{file} names the file {name!r}, which does not lie beside it: {WAY_OUT}")
        return metadata

    def files(self) -> set[str]:
        """The names of the files that hold the tensors."""
        return {info.relative_path for info in (self.read_metadata().storage_data or {}).values()}

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read each piece that this rank needs once, in the order of the files, and hand out its parts."""
        files: dict[str, dict[tuple[int, int], list[ReadItem]]] = {}
        for item in plan.items:
            info = self.storage_data[item.storage_index]
            pieces = files.setdefault(info.relative_path, {})
            pieces.setdefault((info.offset, info.length), []).append(item)
        for name, pieces in files.items():
            file = Path(self.path) / name
            sums = _checksums(file)
            with file.open("rb") as stream:
                for (offset, length), items in sorted(pieces.items(), key=lambda piece: piece[0]):
                    piece = _piece(stream, file, offset, length, sums)
                    for item in items:
                        planner.resolve_tensor(item).copy_(_part(piece, item))
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _checksums(file: Path) -> dict[int, int]:
    sums = file.with_name(file.name + CHECKSUMS)
    try:
        return {int(offset): int(value) for offset, value in json.loads(sums.read_bytes()).items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{sums} cannot be read ({type(error).__name__}: {error}): {WAY_OUT}") from error


def _piece(stream: IO[bytes], file: Path, offset: int, length: int, sums: dict[int, int]) -> Tensor:
    stream.seek(offset)
    content = stream.read(length)
    if zlib.crc32(content) != sums.get(offset):
        where = f"the {length} bytes from {offset} on"
        raise CheckpointError(f"{file}: {where} are not what was written (CRC-32 differs): {WAY_OUT}")
    tensor: Tensor = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return tensor


def _part(piece: Tensor, item: ReadItem) -> Tensor:
    for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        piece = piece.narrow(dim, start, length)
    return piece


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The type of that name, if the metadata of a checkpoint is made of it."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)
