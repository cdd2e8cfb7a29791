"""What each rank writes and reads, as plain data: made on each rank, checked on the first one.

A `Slice` is a rectangle of a logical tensor, which torch.distributed.checkpoint's format knows natively; so any cut can
be written: uneven, empty, along several dims, several pieces of one tensor on one rank. Of that library's ways to make
all ranks agree none is used: it passes pickles from rank to rank. Here descriptions travel as JSON, to rank 0 alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from stretto.checkpoint.contents import Contents
from stretto.checkpoint.peers import CheckpointError
from stretto.checkpoint.tiling import tiling_errors
from stretto.params import Slice


def described(slices: Sequence[Slice]) -> dict[str, Any]:
    """What this rank writes, and of which tensors it holds copies only.

    Every owned piece is in it, the empty ones too: they still say that the tensor exists.
    """
    pieces = [(s.name, _dtype(s.tensor.dtype), s.full_shape, *map(list, _rectangle(s))) for s in slices if s.owner]
    return {"pieces": pieces, "copies": sorted({s.name for s in slices if not s.owner})}


def whole_tensors(said: Iterable[Mapping[str, Any]]) -> dict[str, TensorStorageMetadata]:
    """The tensors that the `described` pieces of all ranks make. Raises CheckpointError unless they tile each once."""
    tensors: dict[str, TensorStorageMetadata] = {}
    errors = set()
    copies: set[str] = set()
    for rank in said:
        copies |= set(rank["copies"])
        for name, dtype, full, offsets, sizes in rank["pieces"]:
            tensor = TensorStorageMetadata(TensorProperties(dtype=getattr(torch, dtype)), torch.Size(full), [])
            known = tensors.setdefault(name, tensor)
            if _kind(known) != _kind(tensor):
                errors.add(f"{name}: {_kind(known)} on one rank, {_kind(tensor)} on another")
            elif torch.Size(sizes).numel():
                known.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
    errors |= {f"{name}: {e}" for name, t in tensors.items() for e in tiling_errors(t.size, t.chunks)}
    errors |= {f"{name}: no rank is owner of any piece" for name in copies - tensors.keys()}
    if errors:
        raise CheckpointError("the slices do not make whole tensors\n  " + "\n  ".join(sorted(errors)))
    return tensors


def wanted(contents: Contents, slices: Sequence[Slice]) -> dict[str, Any]:
    """What this rank would read: one bit for each name of the checkpoint, and what differs. Small at any size."""
    held = _by_name(slices)
    asked = sum(1 << i for i, name in enumerate(sorted(contents.tensors)) if name in held)
    return {"asked": f"{asked:x}", "differences": _differences(contents, held)}


def require_same_tensors(contents: Contents, said: Iterable[Mapping[str, Any]], prefixes: Sequence[str]) -> None:
    """Raise CheckpointError, with everything that differs on any rank, unless what all ranks want is what there is.

    Names in the checkpoint that start with one of `prefixes` must be asked for by at least one rank.
    """
    asked, lines = 0, set[str]()
    for rank in said:
        asked |= int(rank["asked"], 16)
        lines.update(rank["differences"])
    for i, (name, saved) in enumerate(sorted(contents.tensors.items())):
        if name.startswith(tuple(prefixes)) and not asked >> i & 1:
            lines.add(f"{name}: {_kind(saved)} in the checkpoint, absent in this run")
    if lines:
        raise CheckpointError(
            f"{len(lines)} tensors differ between checkpoint and run\n  "
            + "\n  ".join(sorted(lines))
            + "\nRun with the settings of the checkpoint (extra.json), or start without it."
        )


def reads(contents: Contents, slices: Sequence[Slice]) -> Iterator[tuple[ReadItem, Tensor]]:
    """The overlaps of this rank's slices with the pieces in the files, each with the part of a slice that it fills."""
    for name, held in _by_name(slices).items():
        items = create_read_items_for_chunk_list(name, contents.tensors[name], [_chunk(s) for s in held])
        filled = [0] * len(held)
        for item in items:
            position = item.dest_index.index
            assert position is not None
            filled[position] += item.lengths.numel()
            if item.lengths.numel():
                part = held[position].tensor.detach()
                for dim, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
                    part = part.narrow(dim, start, length)
                yield item, part
        for s, n in zip(held, filled, strict=True):
            if n != s.tensor.numel():
                raise CheckpointError(f"{name}: the files hold {n} of the {s.tensor.numel()} elements at {s.offsets}")


def _by_name(slices: Sequence[Slice]) -> dict[str, list[Slice]]:
    held: dict[str, list[Slice]] = {}
    for s in slices:
        held.setdefault(s.name, []).append(s)
    return held


def _differences(contents: Contents, held: Mapping[str, Sequence[Slice]]) -> list[str]:
    lines = []
    for name, slices in held.items():
        saved = _kind(contents.tensors[name]) if name in contents.tensors else "absent"
        kinds = {_text(s.full_shape, s.tensor.dtype) for s in slices} - {saved}
        lines += [f"{name}: {saved} in the checkpoint, {kind} in this run" for kind in kinds]
    return lines


def _rectangle(s: Slice) -> tuple[Sequence[int], torch.Size]:
    if len(s.offsets) != s.tensor.dim() or len(s.full_shape) != s.tensor.dim():
        raise CheckpointError(
            f"{s.name}: {tuple(s.tensor.shape)} at {s.offsets} of {s.full_shape} mixes numbers of dims"
        )
    return s.offsets, s.tensor.shape


def _chunk(s: Slice) -> ChunkStorageMetadata:
    offsets, sizes = _rectangle(s)
    return ChunkStorageMetadata(torch.Size(offsets), sizes)


def _kind(saved: TensorStorageMetadata) -> str:
    return _text(saved.size, saved.properties.dtype)


def _text(shape: Sequence[int], dtype: torch.dtype) -> str:
    """Shape and type of a tensor: "(8, 16) bfloat16"."""
    return f"{tuple(shape)} {_dtype(dtype)}"


def _dtype(dtype: torch.dtype) -> str:
    return f"{dtype}".removeprefix("torch.")
