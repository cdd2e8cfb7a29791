"""What ranks tell each other that is no tensor of the model: texts, and tensors under names.

Bytes cross as tensors and are read as JSON or safetensors, which can only be data. torch's collectives of objects
unpickle what arrives, and whoever can write to a socket of the job could then run code on every rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
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
    device = _device(group)
    length = torch.tensor([len(data)], device=device)
    lengths = [torch.empty_like(length) for _ in range(size)]
    dist.all_gather(lengths, length, group=group)
    sizes = [int(n) for n in lengths]
    mine = torch.zeros(max(*sizes, 1), dtype=torch.uint8)
    mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else mine[:0]
    mine = mine.to(device)
    gathered = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(gathered, mine, group=group)
    return [all_[:n].cpu().numpy().tobytes() for all_, n in zip(gathered, sizes, strict=True)]


def all_same(data: bytes, size: int, group: ProcessGroup | None) -> bool:
    """Whether all ranks have the same `data`: two numbers are reduced, however many ranks there are."""
    if size == 1:
        return True
    digest = int.from_bytes(hashlib.sha256(data).digest()[:7], "big")
    ends = torch.tensor([digest, -digest], device=_device(group))
    dist.all_reduce(ends, dist.ReduceOp.MAX, group=group)
    high, low = ends.tolist()
    return bool(high == -low)


def all_gather_json(value: Any, axis: Axis) -> list[Any]:
    """Each rank's `value` in the order of the axis: what JSON can say, so tuples arrive as lists."""
    return [json.loads(text) for text in all_gather_bytes(json.dumps(value).encode(), axis.size, axis.group)]


def all_gather_tensors(tensors: Mapping[str, Tensor], axis: Axis) -> list[dict[str, Tensor]]:
    """Each rank's named tensors, on the CPU, in the order of the axis."""
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if axis.size == 1:
        return [own]
    packed = all_gather_bytes(safetensors.torch.save(own), axis.size, axis.group)
    return [safetensors.torch.load(each) for each in packed]


def _device(group: ProcessGroup | None) -> torch.device:
    """Where a group of this back end takes tensors from, the CPU first."""
    types = {device.type for device in (group or dist.group.WORLD)._device_types}  # type: ignore[union-attr]
    return torch.device("cpu" if "cpu" in types else "cuda")
