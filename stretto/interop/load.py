"""Weights of a Hugging Face directory into this rank's slices of a model, whatever the layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from stretto.interop.config import HfConfig
from stretto.interop.errors import InteropError
from stretto.interop.files import DTYPES, TensorFiles
from stretto.interop.names import BUFFERS, FileTensor, Shapes, file_tensors
from stretto.params import Slice

_SHOWN = 40

EMBEDDING = "model.embed_tokens.weight"
HEADS = ("lm_head.weight", "embed_out.weight")
"""What files may call a head. Some hold one that is tied a second time."""


def load_weights(directory: Path, config: HfConfig, shapes: Shapes, slices: Sequence[Slice]) -> None:
    """Fill `slices`, this rank's part of the logical tensors of these full `shapes`, from the files of a directory.

    Each rank reads the rectangles that it holds and nothing else, one at a time; sources may be of other dtypes.

    Raises:
        InteropError: before anything is read, with every tensor that is missing, left over, of another shape or of
            a dtype that holds no weights.
    """
    table = file_tensors(config.family.model_type, config.model, shapes)
    with TensorFiles(directory) as files:
        copy = next((name for name in HEADS if name in files.tensors), None) if config.model.tied else None
        names = _matched(files, table, copy)
        where = {piece.logical: (held, n) for held in table for n, piece in enumerate(held.pieces)}
        for part in slices:
            held, n = where[part.name]
            _fill(files, held, n, names[held.name], part)
            if copy is not None and part.name == EMBEDDING:
                _require_copy(files, held, n, names[held.name], copy, part)


def _matched(files: TensorFiles, table: Sequence[FileTensor], copy: str | None) -> Mapping[str, str]:
    """The name in the files of each tensor that is wanted: all of them, and none is left over but a `copy`."""
    there = {name for name in files.tensors if not BUFFERS.search(name) and name != copy}
    names = {held.name: _name(held.name, there) for held in table}
    wrong = []
    for held in table:
        name = names[held.name]
        if name not in there:
            wrong.append(f"{held.name} {list(held.shape)}: missing")
            continue
        found = files.tensors[name]
        if found.shape != held.shape:
            wrong.append(f"{name}: {list(found.shape)} in {found.file}, but config.json makes it {list(held.shape)}")
        if found.dtype not in DTYPES:
            wrong.append(f"{name}: {found.dtype} in {found.file}, must be one of {', '.join(DTYPES)}")
    left = sorted(there - {*names.values()})
    wrong += [f"{name} {list(files.tensors[name].shape)}: left over" for name in left]
    if wrong:
        more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        what = f"{files.directory}: {len(wrong)} tensors do not fit the model of its config.json"
        raise InteropError(what, [*wrong[:_SHOWN], *more])
    return names


def _name(name: str, there: set[str]) -> str:
    """A tensor's name in the files; those of a model without its head lack the first word."""
    bare = name.partition(".")[2]
    return bare if name not in there and bare in there else name


def _fill(files: TensorFiles, held: FileTensor, n: int, name: str, part: Slice) -> None:
    if not part.tensor.numel():
        return
    piece = held.pieces[n]
    columns = [(o, size) for o, size in zip(part.offsets[1:], part.tensor.shape[1:], strict=True)]
    for row, at, count in piece.runs(part.offsets[0], part.tensor.shape[0], held.stride):
        rows = part.tensor.narrow(0, row - part.offsets[0], count)
        if held.transposed:
            rows.copy_(files.read(name, *columns, (at, count)).t())
        else:
            rows.copy_(files.read(name, (at, count), *columns))


def _require_copy(files: TensorFiles, held: FileTensor, n: int, name: str, copy: str, part: Slice) -> None:
    """Raise InteropError unless a tied head that the files hold as well is the embedding."""
    if files.tensors[copy].shape == held.shape:
        head = torch.empty_like(part.tensor)
        _fill(files, held, n, copy, replace(part, tensor=head))
        if torch.equal(head, part.tensor):
            return
    raise InteropError(f"{files.directory}: config.json ties the head to the embedding, but {copy} is not {name}", [])
