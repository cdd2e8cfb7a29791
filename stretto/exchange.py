"""What ranks tell each other that is no tensor of the model: texts, and tensors under names.

Bytes cross as tensors and are read as JSON or safetensors, which can only be data. torch's collectives of objects
unpickle what arrives, and whoever can write to a socket of the job could then run code on every rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from stretto.world import Axis


def all_gather_bytes(data: bytes, size: int, group: ProcessGroup | None) -> list[bytes]:
    """Each rank's `data`, in rank order, on all `size` ranks of `group` (None: the default group); over its CPU back
    end where it has one."""
    if size == 1:
        return [data]
    sizes = _lengths(data, size, group)
    mine = _padded(data, max(sizes), group)
    gathered = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(gathered, mine, group=group)
    return _cut(gathered, sizes)


def gather_json(value: Any, rank: int, size: int, group: ProcessGroup | None) -> list[Any] | None:
    """Each rank's `value`, what JSON can say, in rank order on the first rank of `group`; None on the others."""
    if size == 1:
        return [value]
    data = json.dumps(value).encode()
    sizes = _lengths(data, size, group)
    mine = _padded(data, max(sizes), group)
    gathered = [torch.empty_like(mine) for _ in range(size)] if rank == 0 else None
    dist.gather(mine, gathered, group=group, group_dst=0)
    return gathered and [json.loads(text) for text in _cut(gathered, sizes)]


def all_same(data: bytes, size: int, group: ProcessGroup | None) -> bool:
    """Whether all ranks have the same `data`: two numbers are reduced, however many ranks there are."""
    if size == 1:
        return True
    digest = int.from_bytes(hashlib.sha256(data).digest()[:7], "big")
    ends = torch.tensor([digest, -digest], device=device_of(group))
    dist.all_reduce(ends, dist.ReduceOp.MAX, group=group)
    high, low = ends.tolist()
    return bool(high == -low)


def all_gather_json(value: Any, axis: Axis) -> list[Any]:
    """Each rank's `value` in the order of the axis: what JSON can say, so tuples arrive as lists."""
    return [json.loads(text) for text in all_gather_bytes(json.dumps(value).encode(), axis.size, axis.group)]


def broadcast_json(value: Any, axis: Axis) -> Any:
    """The value of the axis' first rank, what JSON can say, on all of its ranks; the others' does not count."""
    if axis.size == 1:
        return json.loads(json.dumps(value))
    data = json.dumps(value).encode() if axis.rank == 0 else b""
    length = torch.tensor([len(data)], device=device_of(axis.group))
    dist.broadcast(length, group=axis.group, group_src=0)
    text = _padded(data, int(length), axis.group)
    dist.broadcast(text, group=axis.group, group_src=0)
    return json.loads(_cut([text], [int(length)])[0])


def all_gather_tensors(tensors: Mapping[str, Tensor], axis: Axis) -> list[dict[str, Tensor]]:
    """Each rank's named tensors, on the CPU, in the order of the axis."""
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if axis.size == 1:
        return [own]
    packed = all_gather_bytes(safetensors.torch.save(own), axis.size, axis.group)
    return [safetensors.torch.load(each) for each in packed]


def _lengths(data: bytes, size: int, group: ProcessGroup | None) -> list[int]:
    length = torch.tensor([len(data)], device=device_of(group))
    lengths = [torch.empty_like(length) for _ in range(size)]
    dist.all_gather(lengths, length, group=group)
    return [int(n) for n in lengths]


def _padded(data: bytes, size: int, group: ProcessGroup | None) -> Tensor:
    mine = torch.zeros(max(size, 1), dtype=torch.uint8)
    mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else mine[:0]
    return mine.to(device_of(group))


def _cut(gathered: Sequence[Tensor], sizes: Sequence[int]) -> list[bytes]:
    return [each[:n].cpu().numpy().tobytes() for each, n in zip(gathered, sizes, strict=True)]


def device_of(group: ProcessGroup | None) -> torch.device:
    """Where a group of this back end takes tensors from, the CPU first."""
    types = {device.type for device in (group or dist.group.WORLD)._device_types}  # type: ignore[union-attr]
    return torch.device("cpu" if "cpu" in types else "cuda")
