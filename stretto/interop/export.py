"""A checkpoint of ours as a Hugging Face directory, a file at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from stretto.interop.config import HfConfig
from stretto.interop.errors import InteropError
from stretto.interop.files import DTYPES, INDEX, SINGLE, TensorFiles
from stretto.interop.names import FileTensor, Shapes, file_tensors

BESIDE: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)
"""What else lies in a directory and goes with the model: the tokenizer's files, and how to generate."""


class Source(Protocol):
    """Where logical tensors come from: a checkpoint, or a live run."""

    def __call__(self, wanted: Shapes) -> Mapping[str, Tensor]:
        """The whole tensors of these names, on the CPU."""
        ...


@dataclass(frozen=True)
class Named:
    """A tensor to write: what it is made of, its name in the files, its dtype."""

    held: FileTensor
    name: str
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return self.held.numel * self.dtype.itemsize


def plan(config: HfConfig, shapes: Shapes, dtype: torch.dtype, like: Path | None) -> list[Named]:
    """What to write: all tensors in one dtype, or each in the one, and under the name, that it has in `like`."""
    table = file_tensors(config.family.model_type, config.model, shapes)
    if like is None:
        return [Named(held, held.name, dtype) for held in table]
    with TensorFiles(like) as files:
        found = []
        for held in table:
            name = held.name if held.name in files.tensors else held.name.partition(".")[2]
            there = files.tensors.get(name)
            if there is None or there.shape != held.shape or there.dtype not in DTYPES:
                raise InteropError(
                    f"{like} is not a model of this shape: {held.name} {list(held.shape)} is not in it", []
                )
            found.append(Named(held, name, DTYPES[there.dtype]))
    return found


def export(to: Path, raw: Mapping[str, Any], named: Sequence[Named], source: Source, *, limit: int) -> list[Path]:
    """Write config.json and safetensors files of about `limit` bytes each, with an index where they are several.

    One file's tensors are in memory at a time. `to` must be empty or not there yet. Raises InteropError.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InteropError(f"--to {to} is not empty: name a directory that is empty or not there yet", [])
    to.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(named, limit))
    width = f"model-{{:05d}}-of-{len(shards):05d}.safetensors"
    files = [SINGLE] if len(shards) == 1 else [width.format(n + 1) for n in range(len(shards))]
    for shard, file in zip(shards, files, strict=True):
        _write(to / file, shard, source)
    if len(shards) > 1:
        where = {each.name: file for shard, file in zip(shards, files, strict=True) for each in shard}
        index = {
            "metadata": {"total_size": sum(each.size for each in named)},
            "weight_map": dict(sorted(where.items())),
        }
        (to / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (to / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    return [to / file for file in files]


def copy_beside(directory: Path, to: Path) -> list[str]:
    """Copy the tokenizer's files, and how to generate; their names."""
    found = [name for name in BESIDE if (directory / name).is_file()]
    for name in found:
        shutil.copyfile(directory / name, to / name)
    return found


def _shards(named: Sequence[Named], limit: int) -> Iterator[list[Named]]:
    shard: list[Named] = []
    for each in named:
        if shard and sum(other.size for other in shard) + each.size > limit:
            yield shard
            shard = []
        shard.append(each)
    yield shard


def _write(path: Path, shard: Sequence[Named], source: Source) -> None:
    """One file, under another name until it is whole."""
    pieces = {piece.logical: piece.shape for each in shard for piece in each.held.pieces}
    whole = source(pieces)
    temporary = path.with_name(path.name + ".tmp")
    save_file({each.name: _joined(each, whole) for each in shard}, temporary, metadata={"format": "pt"})
    temporary.replace(path)


def _joined(each: Named, whole: Mapping[str, Tensor]) -> Tensor:
    held = each.held
    first = held.pieces[0].shape
    out = torch.empty((sum(piece.shape[0] for piece in held.pieces), *first[1:]), dtype=each.dtype)
    for piece in held.pieces:
        for row, at, count in piece.runs(0, piece.shape[0], held.stride):
            out[at : at + count] = whole[piece.logical][row : row + count].to(each.dtype)
    return out.t().contiguous() if held.transposed else out
