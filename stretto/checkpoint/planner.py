"""Slices as torch.distributed.checkpoint's write and read items.

DCP knows rectangular chunks of logical tensors natively; a `Slice` is one. So no tensor subclass is needed,
and any cut can be written: uneven, empty, along several dims, several pieces of one tensor on one rank.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from stretto.checkpoint.peers import CheckpointError
from stretto.checkpoint.tiling import tiling_errors
from stretto.params import Slice


class SliceSavePlanner(SavePlanner):
    """Each owner writes its piece. Only descriptions travel: to the coordinator, and none back."""

    def __init__(self, slices: Sequence[Slice]) -> None:
        self._owned = [s for s in slices if s.owner]
        self._copies = frozenset(s.name for s in slices if not s.owner)
        self._tensors = {MetadataIndex(s.name, s.offsets): s.tensor for s in self._owned}
        self._plan = SavePlan([])

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Nothing: the slices came with the constructor."""

    def create_local_plan(self) -> SavePlan:
        """Describe every owned piece, the empty ones too: they still say that the tensor exists."""
        self._plan = SavePlan([_write_item(s) for s in self._owned], planner_data=self._copies)
        return self._plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Check that the pieces of all ranks tile each tensor exactly once, and list them."""
        tensors: dict[str, TensorStorageMetadata] = {}
        errors = []
        for item in (item for plan in all_plans for item in plan.items):
            data = item.tensor_data
            assert data is not None
            tensor = TensorStorageMetadata(data.properties, data.size, [])
            known = tensors.setdefault(item.index.fqn, tensor)
            if _kind(known) != _kind(tensor):
                errors.append(f"{item.index.fqn}: {_kind(known)} on one rank, {_kind(tensor)} on another")
            elif data.chunk.sizes.numel():
                known.chunks.append(data.chunk)
        for name, tensor in tensors.items():
            errors += [f"{name}: {e}" for e in tiling_errors(tensor.size, tensor.chunks)]
        orphans = frozenset[str]().union(*(plan.planner_data for plan in all_plans)) - tensors.keys()
        errors += [f"{name}: no rank is owner of any piece" for name in orphans]
        if errors:
            raise CheckpointError("the slices do not make whole tensors\n  " + "\n  ".join(sorted(set(errors))))
        return [SavePlan([]) for _ in all_plans], Metadata(dict(tensors))

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Put back the items that did not travel; leave out those with nothing to write."""
        items = [i for i in self._plan.items if i.tensor_data is not None and i.tensor_data.chunk.sizes.numel()]
        return replace(new_plan, items=items)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The live storage; the writer copies it to the CPU."""
        return self._tensors[write_item.index].detach()


class SliceLoadPlanner(LoadPlanner):
    """Each rank reads what overlaps its slices; the coordinator hears only which names were asked for.

    `prefixes`: names in the checkpoint that start with one of them must be asked for by at least one rank.
    """

    def __init__(self, slices: Sequence[Slice], prefixes: Sequence[str]) -> None:
        self._slices: dict[str, list[Slice]] = {}
        for s in slices:
            self._slices.setdefault(s.name, []).append(s)
        self._prefixes = tuple(prefixes)
        self._tensors: dict[str, Any] = {}

    def set_up_planner(  # DCP names the arguments
        self,
        state_dict: dict[str, Any],  # noqa: ARG002
        metadata: Metadata | None = None,
        is_coordinator: bool = False,  # noqa: ARG002
    ) -> None:
        """Take the list of what is in the checkpoint."""
        assert metadata is not None
        self._tensors = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        """What differs, and one bit for each name of the checkpoint: messages stay small at any size."""
        asked = sum(1 << i for i, name in enumerate(sorted(self._tensors)) if name in self._slices)
        return LoadPlan([], planner_data=(asked, self._differences()))

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Reject, with everything that differs on any rank, or let all ranks read."""
        asked, lines = 0, set()
        for plan in global_plan:
            asked |= plan.planner_data[0]
            lines.update(plan.planner_data[1])
        for i, (name, saved) in enumerate(sorted(self._tensors.items())):
            if name.startswith(self._prefixes) and not asked >> i & 1:
                lines.add(f"{name}: {_kind(saved)} in the checkpoint, absent in this run")
        if lines:
            raise CheckpointError(
                f"{len(lines)} tensors differ between checkpoint and run\n  "
                + "\n  ".join(sorted(lines))
                + "\nRun with the settings of the checkpoint (extra.json), or start without it."
            )
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:  # noqa: ARG002
        """The overlaps of this rank's slices with the pieces in the files."""
        return LoadPlan([item for name, slices in self._slices.items() for item in self._reads(name, slices)])

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """A checkpoint of slices holds tensors only."""
        raise NotImplementedError(f"{read_item.dest_index.fqn} is not a tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of the live slice that this read fills."""
        name, position = read_item.dest_index.fqn, read_item.dest_index.index
        assert position is not None
        part = self._slices[name][position].tensor.detach()
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing: `resolve_tensor` gave a view."""

    def _differences(self) -> list[str]:
        lines = []
        for name, slices in self._slices.items():
            saved = _kind(self._tensors[name]) if name in self._tensors else "absent"
            wanted = {_kind_of_slice(s) for s in slices} - {saved}
            lines += [f"{name}: {saved} in the checkpoint, {w} in this run" for w in wanted]
        return lines

    def _reads(self, name: str, slices: Sequence[Slice]) -> list[ReadItem]:
        saved = self._tensors[name]
        items = create_read_items_for_chunk_list(name, saved, [_chunk(s) for s in slices])
        filled = [0] * len(slices)
        for item in items:
            assert item.dest_index.index is not None
            filled[item.dest_index.index] += item.lengths.numel()
        for s, n in zip(slices, filled, strict=True):
            if n != s.tensor.numel():
                raise CheckpointError(f"{name}: the files hold {n} of the {s.tensor.numel()} elements at {s.offsets}")
        return [item for item in items if item.lengths.numel()]


def _chunk(s: Slice) -> ChunkStorageMetadata:
    if len(s.offsets) != s.tensor.dim() or len(s.full_shape) != s.tensor.dim():
        raise CheckpointError(
            f"{s.name}: {tuple(s.tensor.shape)} at {s.offsets} of {s.full_shape} mixes numbers of dims"
        )
    return ChunkStorageMetadata(torch.Size(s.offsets), s.tensor.shape)


def _write_item(s: Slice) -> WriteItem:
    properties = TensorProperties(dtype=s.tensor.dtype)
    data = TensorWriteData(_chunk(s), properties, torch.Size(s.full_shape))
    return WriteItem(MetadataIndex(s.name, s.offsets), WriteItemType.SHARD, tensor_data=data)


def _kind(saved: Any) -> str:
    """Shape and type of a tensor in a checkpoint: "(8, 16) bfloat16"."""
    if not isinstance(saved, TensorStorageMetadata):
        return "not a tensor"
    return f"{tuple(saved.size)} {saved.properties.dtype}".replace("torch.", "")


def _kind_of_slice(s: Slice) -> str:
    return f"{tuple(s.full_shape)} {s.tensor.dtype}".replace("torch.", "")
