"""What each rank writes and reads of its slices, as plain data.

A `Slice` is a rectangle of a logical tensor; so any cut can be written: uneven, empty, along several dims, several
pieces of one tensor on one rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stretto.checkpoint import index
from stretto.checkpoint.errors import CheckpointError
from stretto.checkpoint.index import Index, Piece
from stretto.checkpoint.part import Mine, Owned
from stretto.checkpoint.tiling import intersection
from stretto.params import Slice


def described(slices: Sequence[Slice]) -> tuple[Mine, list[Tensor]]:
    """What this rank writes, and the tensors of it.

    Every owned piece is in it, the empty ones too: they still say that the tensor exists.
    """
    owned = [s for s in slices if s.owner]
    for s in slices:
        _require_dims(s)
    pieces = tuple(
        Owned(s.name, dtype_name(s.tensor.dtype), tuple(s.full_shape), tuple(s.offsets), tuple(s.tensor.shape))
        for s in owned
    )
    for piece in pieces:
        _ = piece.nbytes
    return Mine(pieces, tuple(sorted({s.name for s in slices if not s.owner}))), [s.tensor.detach() for s in owned]


def numbers(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, contiguous, on the CPU."""
    flat = tensor.cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data).cast("B")


def wanted(contents: Index, slices: Sequence[Slice]) -> dict[str, Any]:
    """What this rank would read: one bit for each name of the checkpoint, and what differs. Small at any size."""
    held = _by_name(slices)
    asked = sum(1 << i for i, name in enumerate(sorted(contents.tensors)) if name in held)
    return {"asked": f"{asked:x}", "differences": _differences(contents, held)}


def require_same_tensors(contents: Index, said: Iterable[Mapping[str, Any]], prefixes: Sequence[str]) -> None:
    """Raise CheckpointError, with everything that differs on any rank, unless what all ranks want is what there is.

    Names in the checkpoint that start with one of `prefixes` must be asked for by at least one rank.
    """
    asked, lines = 0, set[str]()
    for rank in said:
        asked |= int(rank["asked"], 16)
        lines.update(rank["differences"])
    for i, (name, saved) in enumerate(sorted(contents.tensors.items())):
        if name.startswith(tuple(prefixes)) and not asked >> i & 1:
            lines.add(f"{name}: {saved} in the checkpoint, absent in this run")
    if lines:
        raise CheckpointError(
            f"{len(lines)} tensors differ between checkpoint and run\n  "
            + "\n  ".join(sorted(lines))
            + "\nRun with the settings of the checkpoint (extra.json), or start without it."
        )


def reads(contents: Index, slices: Sequence[Slice]) -> Iterator[tuple[index.Tensor, Piece, Slice]]:
    """Each piece in the files that has something of one of this rank's slices."""
    for name, held in _by_name(slices).items():
        saved = contents.near(name, [(s.offsets, tuple(s.tensor.shape)) for s in held])
        for s in held:
            rectangle, filled = (s.offsets, tuple(s.tensor.shape)), 0
            for piece in saved.pieces:
                if common := intersection((piece.offsets, piece.sizes), rectangle):
                    filled += torch.Size(common[1]).numel()
                    yield saved, piece, s
            if filled != s.tensor.numel():
                raise CheckpointError(
                    f"{name}: the files hold {filled} of the {s.tensor.numel()} elements at {s.offsets}"
                )


def dtype_name(dtype: torch.dtype) -> str:
    """Of torch.bfloat16: "bfloat16"."""
    return f"{dtype}".removeprefix("torch.")


def _by_name(slices: Sequence[Slice]) -> dict[str, list[Slice]]:
    held: dict[str, list[Slice]] = {}
    for s in slices:
        held.setdefault(s.name, []).append(s)
    return held


def _differences(contents: Index, held: Mapping[str, Sequence[Slice]]) -> list[str]:
    lines = []
    for name, slices in held.items():
        for s in slices:
            _require_dims(s)
        saved = str(contents.tensors.get(name, "absent"))
        kinds = {f"{tuple(s.full_shape)} {dtype_name(s.tensor.dtype)}" for s in slices} - {saved}
        lines += [f"{name}: {saved} in the checkpoint, {kind} in this run" for kind in sorted(kinds)]
    return lines


def _require_dims(s: Slice) -> None:
    if len(s.offsets) != s.tensor.dim() or len(s.full_shape) != s.tensor.dim():
        raise CheckpointError(
            f"{s.name}: {tuple(s.tensor.shape)} at {s.offsets} of {s.full_shape} mixes numbers of dims"
        )
