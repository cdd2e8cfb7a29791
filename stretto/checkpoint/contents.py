"""`.metadata`: which piece of which tensor lies where. torch.distributed.checkpoint's format; read, never unpickled.

Every number in it is held against the files: a piece lies inside its file and its tensor, is large enough for its
elements, and the pieces tile each tensor. So no size that it names is larger than what is on disk.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from stretto.checkpoint.inert import Made, Named, decode
from stretto.checkpoint.marker import LARGEST_METADATA, METADATA, WAY_OUT, write_atomically
from stretto.checkpoint.peers import CheckpointError
from stretto.checkpoint.tiling import tiling_errors
from stretto.reading import UnreadableError, read_bytes, shown

_DCP: Final = "torch.distributed.checkpoint.metadata"
_TYPES: Final = (
    "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties "
    "TensorStorageMetadata _MEM_FORMAT_ENCODING"
)
_DTYPES: Final = {f"torch.{name}": each for name, each in vars(torch).items() if isinstance(each, torch.dtype)}
_NAMES: Final = frozenset(
    {*(f"{_DCP}.{name}" for name in _TYPES.split()), *_DTYPES}
    | {"torch.distributed.checkpoint.filesystem._StorageInfo", "torch.serialization._get_layout", "torch.Size"}
    | {"pathlib.PosixPath"}
)


@dataclass(frozen=True)
class Place:
    """Where a piece lies: `length` bytes from `offset` on of a file beside `.metadata`."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Contents:
    """The tensors of a checkpoint with their pieces, and the place of each by name and offsets."""

    tensors: Mapping[str, TensorStorageMetadata]
    places: Mapping[tuple[str, tuple[int, ...]], Place]


def write_contents(path: Path, contents: Contents) -> None:
    """Write `.metadata` as torch.distributed.checkpoint does, safe on disk."""
    storage = {
        MetadataIndex(name, offsets): _StorageInfo(place.file, place.offset, place.length)
        for (name, offsets), place in contents.places.items()
    }
    metadata = Metadata(dict(contents.tensors), None, storage, StorageMeta(), CURRENT_DCP_VERSION)
    write_atomically(path / METADATA, pickle.dumps(metadata))


def read_contents(path: Path) -> Contents:
    """What `.metadata` says. Raises CheckpointError when it is damaged or does not agree with the files."""
    file = path / METADATA
    try:
        made = _state(decode(read_bytes(file, LARGEST_METADATA), _NAMES), "Metadata")
        tensors = {_text(name): _tensor(each) for name, each in made["state_dict_metadata"].items()}
        places = dict(_place(*item) for item in (made["storage_data"] or {}).items())
        _check(tensors, places, {name: (path / name).stat().st_size for name in {p.file for p in places.values()}})
    except (ValueError, TypeError, KeyError, AttributeError, OSError, OverflowError) as error:
        why = str(error) if isinstance(error, UnreadableError) else f"{type(error).__name__}: {shown(str(error))}"
        raise CheckpointError(f"{file} cannot be read ({why}): {WAY_OUT}") from error
    return Contents(tensors, places)


def _check(
    tensors: Mapping[str, TensorStorageMetadata],
    places: Mapping[tuple[str, tuple[int, ...]], Place],
    sizes: Mapping[str, int],
) -> None:
    for name, tensor in tensors.items():
        if errors := tiling_errors(tensor.size, tensor.chunks):
            raise UnreadableError(f"{shown(name)}: {errors[0]}")
        for chunk in tensor.chunks:
            place = places.get((name, tuple(chunk.offsets)))
            if place is None:
                raise UnreadableError(f"{shown(name)}: no file holds the piece at {tuple(chunk.offsets)}")
            need = math.prod(chunk.sizes) * tensor.properties.dtype.itemsize
            if not 0 <= place.offset <= place.offset + place.length <= sizes[place.file] or place.length < need:
                raise UnreadableError(
                    f"{shown(name)}: {place.length:,} bytes from {place.offset:,} on for the {need:,} of the piece at "
                    f"{tuple(chunk.offsets)}, in a file of {sizes[place.file]:,}"
                )


def _tensor(made: object) -> TensorStorageMetadata:
    said = _state(made, "TensorStorageMetadata")
    properties = _made(said["properties"], f"{_DCP}.TensorProperties").state
    dtype = properties[0]
    if not isinstance(dtype, Named) or dtype.name not in _DTYPES:
        raise UnreadableError(f"{shown(dtype)} is no type of elements")
    size = _size(said["size"])
    chunks = [ChunkStorageMetadata(_size(c["offsets"]), _size(c["sizes"])) for c in _chunks(said["chunks"])]
    if any(len(chunk.offsets) != len(size) or len(chunk.sizes) != len(size) for chunk in chunks):
        raise UnreadableError(f"pieces of a tensor of {len(size)} dims have other numbers of dims")
    return TensorStorageMetadata(TensorProperties(dtype=_DTYPES[dtype.name]), size, chunks)


def _chunks(made: Sequence[object]) -> Iterator[Mapping[str, Any]]:
    return (_state(each, "ChunkStorageMetadata") for each in made)


def _place(index: object, info: object) -> tuple[tuple[str, tuple[int, ...]], Place]:
    at, said = _state(index, "MetadataIndex"), _made(info, "torch.distributed.checkpoint.filesystem._StorageInfo").state
    name = said["relative_path"]
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
        raise UnreadableError(f"it names the file {shown(name)}, which does not lie beside it")
    if "transform_descriptors" in said:
        raise UnreadableError("its pieces are transformed, which no Stretto does")
    return (_text(at["fqn"]), tuple(_size(at["offset"]))), Place(name, _whole(said["offset"]), _whole(said["length"]))


def _size(made: object) -> torch.Size:
    (numbers,) = _made(made, "torch.Size").args
    return torch.Size([_whole(n) for n in numbers])


def _state(made: object, name: str) -> Mapping[str, Any]:
    state = _made(made, f"{_DCP}.{name}").state
    if not isinstance(state, dict):
        raise UnreadableError(f"a {name} has no fields")
    return state


def _made(made: object, name: str) -> Made:
    if not isinstance(made, Made) or made.name != name:
        raise UnreadableError(f"it has {shown(made)} where a {name} must be")
    return made


def _whole(n: object) -> int:
    if type(n) is not int or not 0 <= n < 2**63:
        raise UnreadableError(f"{shown(n)} is no size")
    return n


def _text(name: object) -> str:
    if not isinstance(name, str):
        raise UnreadableError(f"{shown(name)} is no name")
    return name
