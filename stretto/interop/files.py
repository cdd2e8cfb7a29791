"""The safetensors files of a directory: which tensors they hold, and rectangles of them, read where they lie.

What stands in a directory is somebody else's: an index may name only files beside it, and every tensor must be in the
file that it names. Headers are checked by safetensors itself. Data is read, not mapped: pages of a mapped file count as
memory of who reads it, and a model would be in memory whole.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stretto.interop.config import read_json
from stretto.interop.errors import InteropError
from stretto.interop.pread import Reads

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
INDEX_LIMIT = 1 << 26
"""Bytes of an index: one of a model with 100,000 tensors has about ten million."""

DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
)
"""What weights may be in, by the names that safetensors has for it."""


@dataclass(frozen=True)
class Held:
    """A tensor of a file."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    """Of its first byte in the file."""


class TensorFiles:
    """All tensors of a directory, as one."""

    def __init__(self, directory: Path, *, single: str = SINGLE) -> None:
        """Read the headers; without an index `single` is the only file.

        Raises InteropError when they cannot be read, or do not agree with the index.
        """
        self.directory = directory
        names = _files(directory, single)
        self.reads = Reads()
        self.tensors: dict[str, Held] = {}
        twice: list[str] = []
        try:
            for file in sorted({*names.values()} if isinstance(names, dict) else names):
                self._read_header(file, twice)
        except BaseException:
            self.close()
            raise
        wrong = [f"{name}: in more than one file" for name in twice]
        if isinstance(names, dict):
            said = {name: file for name, file in names.items() if self._file_of(name) != file}
            wrong += [f"{name}: {INDEX} says {file!r:.80}, which does not hold it" for name, file in said.items()]
            wrong += [f"{name}: in {self.tensors[name].file}, not in {INDEX}" for name in self.tensors.keys() - names]
        if wrong:
            self.close()
            raise InteropError(f"{directory}: the files do not agree with each other", sorted(wrong)[:50])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of all files."""
        self.reads.close()

    def read(self, name: str, dims: tuple[tuple[int, int], ...], into: Tensor, step: int = 1) -> None:
        """Begin to fill `into` with the rectangle of a tensor that begins at, and is as long as, `dims` say.

        The bytes of it alone are read; of its last dimension each `step`-th is taken. `wait` says when.
        """
        held = self.tensors[name]
        self.reads.begin(self.directory / held.file, held.offset, held.shape, DTYPES[held.dtype], dims, into, step)

    def wait(self) -> int:
        """Until all that was begun is there: the bytes that were read since. Raises InteropError."""
        try:
            return self.reads.wait()
        except OSError as error:
            raise InteropError(f"{self.directory}: weights cannot be read: {error}", []) from error

    def _file_of(self, name: str) -> str | None:
        return self.tensors[name].file if name in self.tensors else None

    def _read_header(self, file: str, twice: list[str]) -> None:
        path = self.directory / file
        try:
            with safe_open(path, "pt"):  # it checks that offsets fit sizes, and each other, and the file
                pass
            header, begin = _header(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise InteropError(f"{path} cannot be read as safetensors: {error}", []) from error
        for name, said in header.items():
            if name in self.tensors:
                twice.append(name)
            self.tensors[name] = Held(file, tuple(said["shape"]), said["dtype"], begin + said["data_offsets"][0])


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """What a checked file says of its tensors, and where their bytes begin."""
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _files(directory: Path, single: str) -> dict[str, str] | list[str]:
    """The file of each tensor as an index says it, or the only file. Raises InteropError."""
    index = directory / INDEX
    if single != SINGLE or not index.exists():
        if (directory / single).exists():
            return [single]
        other = next(directory.glob("*.bin"), None)
        hint = f"; {other.name} is a pickle, which may run code: take the model as safetensors" if other else ""
        raise InteropError(f"{directory} has neither {single} nor {INDEX}{hint}", [])
    said = read_json(index, INDEX_LIMIT).get("weight_map")
    if not isinstance(said, dict) or not said or not all(isinstance(file, str) for file in said.values()):
        raise InteropError(f"{index}: weight_map must say the file of each tensor", [])
    for file in {*said.values()}:
        if Path(file).name != file or file in ("", ".", "..") or not file.endswith(".safetensors"):
            raise InteropError(f"{index} names the file {file!r:.100}: it must be a .safetensors beside it", [])
    return said
