"""A model of ours as a Hugging Face one: named tensors one after the other, and the files that hold them.

One tensor is in memory at a time, wherever it comes from: a checkpoint, or a run that goes on.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Protocol

import torch
from torch import Tensor

from stretto.arguments.sections import A, B, TuningConfig
from stretto.interop.config import HfConfig
from stretto.interop.errors import InteropError
from stretto.interop.files import DTYPES, INDEX, SINGLE, TensorFiles
from stretto.interop.names import FileTensor, Piece, Shapes, file_tensors, further_copies
from stretto.tensor_parallel.lora import lora_of

BESIDE: Final = (
    (
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt"),
    ),
    ("generation_config.json",),
)
"""What else lies in a directory and goes with the model: the tokenizer's files, and how to generate."""

SHARD: Final = 5 * 10**9
"""Bytes of one file, if nobody says how many."""

_SAID: Final = {dtype: name for name, dtype in DTYPES.items()}


class Source(Protocol):
    """Where logical tensors come from: a checkpoint, or a live run."""

    def __call__(self, wanted: Shapes) -> Mapping[str, Tensor]:
        """The whole tensors of these names."""
        ...


@dataclass(frozen=True)
class Merged:
    """A source whose adapters are added to the matrices that they belong to, in fp32 or wider."""

    source: Source
    adapters: Shapes
    tuning: TuningConfig

    def __call__(self, wanted: Shapes) -> Mapping[str, Tensor]:
        """The same tensors, merged."""
        lora = lora_of(self.tuning)
        pairs = {name: tuple(f"{name.removesuffix('.weight')}.{each}" for each in (A, B)) for name in wanted}
        pairs = {name: pair for name, pair in pairs.items() if pair[0] in self.adapters}
        need = {**wanted, **{each: self.adapters[each] for pair in pairs.values() for each in pair}}
        found = self.source(need)
        whole = {name: found[name] for name in wanted}
        for name, (first, second) in pairs.items():
            assert lora is not None
            wide = torch.promote_types(found[first].dtype, torch.float32)
            product = found[second].to(wide) @ found[first].to(wide)
            whole[name] = whole[name].to(wide) + lora.scale * product
        return whole


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
    table = [*file_tensors(config.family.model_type, config.model, shapes)]
    for name, logical in further_copies(config.model).items():
        shape = shapes[logical]
        table.append(FileTensor(name, (Piece(logical, shape, 0, shape[0]),)))
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


def tensors(named: Sequence[Named], source: Source) -> Iterator[tuple[str, Tensor]]:
    """Each tensor by its name in the files, whole, one at a time."""
    for each in named:
        yield each.name, _joined(each, source({piece.logical: piece.shape for piece in each.held.pieces}))


def ordered(named: Sequence[Named], limit: int) -> list[Named]:
    """The tensors as `export` asks for them: who holds a part of a live run asks for the same, at the same time."""
    return [each for shard in _shards(named, limit) for each in shard]


def require_empty(to: Path) -> None:
    """Raise InteropError where something would be written over."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InteropError(f"{to} is not empty: name a directory that is empty or not there yet", [])


@contextmanager
def all_or_nothing(to: Path, *names: str) -> Iterator[None]:
    """Write files of these names into a directory that is empty or not there, which after an error it is again.

    Raises InteropError where something would be written over; an OSError, as of a full disk, names the directory.
    """
    require_empty(to)
    made = not to.exists()
    to.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException as error:
        for name in names:
            (to / name).unlink(missing_ok=True)
            _unfinished(to / name).unlink(missing_ok=True)
        if made:
            with suppress(OSError):  # somebody else has put a file there
                to.rmdir()
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror, str(to)) from error
        raise


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def export(to: Path, raw: Mapping[str, Any], named: Sequence[Named], source: Source, *, limit: int) -> list[Path]:
    """Write config.json and safetensors files of about `limit` bytes each, with an index where they are several.

    One tensor is in memory at a time. `to` must be empty or not there yet. Raises InteropError.
    """
    shards = list(_shards(named, limit))
    width = f"model-{{:05d}}-of-{len(shards):05d}.safetensors"
    files = [SINGLE] if len(shards) == 1 else [width.format(n + 1) for n in range(len(shards))]
    with all_or_nothing(to, *files, INDEX, "config.json"):
        for shard, file in zip(shards, files, strict=True):
            write_tensors(to / file, [(e.name, e.dtype, e.held.shape) for e in shard], tensors(shard, source))
        if len(shards) > 1:
            where = {each.name: file for shard, file in zip(shards, files, strict=True) for each in shard}
            index = {
                "metadata": {"total_size": sum(each.size for each in named)},
                "weight_map": dict(sorted(where.items())),
            }
            (to / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        (to / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    return [to / file for file in files]


def copy_beside(directories: Sequence[Path], to: Path) -> list[str]:
    """Copy the tokenizer's files, and how to generate, each of the first directory that has any; their names."""
    found = []
    for names in BESIDE:
        there = ([each / name for name in names if (each / name).is_file()] for each in directories)
        found += next(filter(None, there), [])
    for file in found:
        shutil.copyfile(file, to / file.name)
    return [file.name for file in found]


def write_tensors(
    path: Path, said: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], tensors: Iterator[tuple[str, Tensor]]
) -> None:
    """A safetensors file of tensors that come one by one, in the order in which they are said; under another name
    until it is whole. To be called within `all_or_nothing`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in said:
        begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _SAID[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with _unfinished(path).open("wb", buffering=0) as stream:
        _write(stream, memoryview(struct.pack("<Q", len(text)) + text))
        for (name, dtype, shape), (found, tensor) in zip(said, tensors, strict=True):
            if (name, dtype, shape) != (found, tensor.dtype, tuple(tensor.shape)):
                raise ValueError(f"{path}: {found} {tensor.dtype} {list(tensor.shape)} comes where {name} was said")
            array: Any = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()
            _write(stream, memoryview(array))
    _unfinished(path).replace(path)


def _write(stream: IO[bytes], content: memoryview) -> None:
    while content:
        content = content[stream.write(content) :]


def _shards(named: Sequence[Named], limit: int) -> Iterator[list[Named]]:
    """Files of at most `limit` bytes, or one tensor; in each the widest dtypes first, so that all are aligned."""
    shard: list[Named] = []
    for each in named:
        if shard and sum(other.size for other in shard) + each.size > limit:
            yield sorted(shard, key=lambda each: -each.dtype.itemsize)
            shard = []
        shard.append(each)
    yield sorted(shard, key=lambda each: -each.dtype.itemsize)


def _joined(each: Named, whole: Mapping[str, Tensor]) -> Tensor:
    """A tensor of a file, of the logical ones in it."""
    held = each.held
    one = whole[held.pieces[0].logical]
    if len(held.pieces) == 1 and not held.transposed:
        return one.to(each.dtype)
    out = torch.empty(held.shape, dtype=each.dtype, device=one.device)
    for n, piece in enumerate(held.pieces):
        place = held.place(n)
        rows = out if place is None else out[place]
        rows = rows.t() if held.transposed else rows
        for own, there in piece.runs(0, piece.shape[0], held.stride):
            rows[there] = whole[piece.logical][own].to(each.dtype)
    return out
